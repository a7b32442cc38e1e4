"""Smooth camera paths through a room: orbits, side steps, walks and turns on the spot.

Shapes: V views; eye_V3 and aim_V3 float64 metres (world: z up); T_V44 float64 world to camera, OpenCV axes (x right,
y down, z forward).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FULL = 24  # views of the whole path at its natural step; fewer views cover less of it, more views step finer


@dataclass(frozen=True)
class Path:
    """A path as a function of s in 0..1: the eye and the viewing direction, plus the lens."""

    kind: str
    centre_2: tuple[float, float]
    start: float
    turn: float
    radius: float
    travel: float
    height: float
    pitch: float
    wobble: tuple[float, ...]
    field_of_view: float

    def eyes(self, s_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Eye positions and unit viewing directions, both [V, 3]."""
        heading = self.start + self.turn * (s_V - 0.5)
        phase = self.wobble
        sway = np.sin(2 * np.pi * (s_V * phase[0] + phase[1]))
        rise = np.sin(2 * np.pi * (s_V * phase[2] + phase[3]))
        x0, y0 = self.centre_2
        if self.kind == "orbit":  # looks inwards across the centre
            radius = self.radius * (1 + 0.06 * sway)
            x, y = x0 - radius * np.cos(heading), y0 - radius * np.sin(heading)
        else:  # a straight line at an angle to the view: across it (strafe) or along it (walk), or hardly any (turn)
            angle = self.start + {"strafe": np.pi / 2, "walk": 0.35, "turn": np.pi / 2}[self.kind]
            along = self.travel * (s_V - 0.5) * (-1 if self.kind == "strafe" and self.turn > 0 else 1)
            x = x0 - self.radius * np.cos(self.start) + along * np.cos(angle) + 0.06 * sway * np.sin(angle)
            y = y0 - self.radius * np.sin(self.start) + along * np.sin(angle) - 0.06 * sway * np.cos(angle)
        pitch = self.pitch + 0.05 * sway
        yaw = heading + 0.04 * rise
        eye = np.stack([x, y, self.height + 0.10 * rise], -1)
        look = np.stack([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)], -1)
        return eye, look

    def poses(self, views: int) -> np.ndarray:
        """DistContext-to-camera matrices [views, 4, 4]."""
        s_V = np.arange(views) / (max(views, FULL) - 1)
        eye, look = self.eyes(s_V)
        roll = 0.035 * np.sin(2 * np.pi * (s_V * self.wobble[2] + self.wobble[1]))
        return np.stack([_pose(e, f, r) for e, f, r in zip(eye, look, roll, strict=True)])

    def intrinsics(self, size: int) -> np.ndarray:
        """K [3, 3] float64 of a square picture."""
        focal = size / 2 / np.tan(np.radians(self.field_of_view) / 2)
        return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])


def _pose(eye_3: np.ndarray, forward_3: np.ndarray, roll: float) -> np.ndarray:
    right = np.cross(forward_3, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward_3, right)
    R = np.stack([np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right, forward_3])
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, -R @ eye_3
    return T


def draw_path(rng: np.random.Generator, length: float, width: float, height: float) -> Path:
    """A path inside a room of length x width x height metres whose floor is centred on the origin."""
    kind = str(rng.choice(["orbit", "strafe", "walk", "turn"], p=[0.45, 0.25, 0.18, 0.12]))
    room = min(length, width) / 2 - 0.7
    sign = float(rng.choice([-1, 1]))
    start = float(rng.uniform(0, 2 * np.pi))
    radius = {"orbit": min(room * 0.95, 2.5), "strafe": room * 0.62, "walk": room * 0.3, "turn": room * 0.35}[kind]
    turn = {"orbit": (1.5, 2.3), "strafe": (1.3, 1.9), "walk": (1.15, 1.45), "turn": (1.6, 2.0)}[kind]
    travel = {"orbit": 0.0, "strafe": min(3.4, 1.5 * room), "walk": min(2.4, 1.1 * room), "turn": min(1.9, room)}[kind]
    return Path(
        kind=kind,
        centre_2=(0.12 * room * float(rng.uniform(-1, 1)), 0.12 * room * float(rng.uniform(-1, 1))),
        start=start,
        turn=sign * float(rng.uniform(*turn)),
        radius=radius,
        travel=travel,
        height=float(rng.uniform(1.2, min(1.75, height - 0.8))),
        pitch=float(rng.uniform(-0.22, -0.05)),
        wobble=tuple(float(w) for w in rng.uniform((0.8, 0, 0.8, 0), (1.6, 1, 1.6, 1))),
        field_of_view=float(rng.uniform(58, 72)),
    )
