"""All textures of a scene, lit, in one array with mip levels, and how to sample it.

Shapes: F = 6 S faces (numbered solid * 6 + side), L mip levels, N samples. texels_T uint32 (RGBX bytes, display
space); place_LF int64 the first texel of a level, height_LF and width_LF float32 its size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastmum.scenes.layout import Scene
from fastmum.scenes.light import face_nodes, illuminate
from fastmum.scenes.pictures import MATERIALS
from fastmum.scenes.shapes import BALL, DRUM, SHELL, Solids, side_size, sides_of
from fastmum.scenes.textures import Face, worn_edges

LEVELS = 11
NODE = 0.09  # metres between the nodes light is computed on
BRIGHTEST = np.float32(1.3)  # the gain that light tends to


@dataclass(frozen=True)
class Atlas:
    """Lit textures; texel_F metres a texel."""

    texels_T: np.ndarray
    place_LF: np.ndarray
    height_LF: np.ndarray
    width_LF: np.ndarray
    texel_F: np.ndarray

    def sample(self, face_N: np.ndarray, u_N: np.ndarray, v_N: np.ndarray, footprint_N: np.ndarray) -> np.ndarray:
        """Trilinear colours [N, 3] float32 in 0..255; footprint_N is the sample's width on the surface in metres."""
        level = np.log2(np.maximum(footprint_N / self.texel_F[face_N], np.float32(1.0)))
        level = np.minimum(level, np.float32(LEVELS - 1.001))
        lower = level.astype(np.int64)
        weight = (level - lower)[:, None]
        fine = self._bilinear(lower, face_N, u_N, v_N)
        coarse = np.flatnonzero(weight[:, 0] > 0.02)
        fine[coarse] += (
            self._bilinear(lower[coarse] + 1, face_N[coarse], u_N[coarse], v_N[coarse]) - fine[coarse]
        ) * weight[coarse]
        return fine

    def _bilinear(self, level_N: np.ndarray, face_N: np.ndarray, u_N: np.ndarray, v_N: np.ndarray) -> np.ndarray:
        entry = level_N * self.place_LF.shape[1] + face_N
        width, height = self.width_LF.ravel()[entry], self.height_LF.ravel()[entry]
        x = np.clip(u_N * width - np.float32(0.5), 0, width - 1)
        y = np.clip(v_N * height - np.float32(0.5), 0, height - 1)
        x0, y0 = x.astype(np.int64), y.astype(np.int64)
        fx, fy = (x - x0)[:, None], (y - y0)[:, None]
        right = (x0 + 1 < width).astype(np.int64)
        down = np.where(y0 + 1 < height, width, 0).astype(np.int64)
        start = self.place_LF.ravel()[entry] + y0 * width.astype(np.int64) + x0
        top = _mix(self._fetch(start), self._fetch(start + right), fx)
        return _mix(top, _mix(self._fetch(start + down), self._fetch(start + down + right), fx), fy)[:, :3]

    def _fetch(self, index_N: np.ndarray) -> np.ndarray:
        return self.texels_T[index_N].view(np.uint8).reshape(-1, 4).astype(np.float32)


def _mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    b -= a
    b *= weight
    b += a
    return b


def bake(scene: Scene, eyes_V3: np.ndarray, pixel: float, seed: tuple[int, ...]) -> Atlas:
    """Paint and light every face that a camera can see.

    Args:
        scene: what to paint.
        eyes_V3: camera positions over the whole path; they set how fine each texture must be.
        pixel: width of a pixel one metre away, metres.
        seed: of the materials and of the random shadow rays.
    """
    solids = scene.solids
    faces = _visible_faces(solids, eyes_V3)
    light = _light_faces(scene, faces, np.random.default_rng(seed))
    total = 6 * len(solids)
    place, texel_F = np.zeros((LEVELS, total), np.int64), np.ones(total, np.float32)
    height, width = np.ones((2, LEVELS, total), np.float32)
    chunks, end = [np.full(1, 0x00808080, np.uint32)], 1
    for (s, side, near), light_CHW in zip(faces, light, strict=True):
        face_id = 6 * s + side
        metres = side_size(int(solids.kind_S[s]), side, solids.half_S3[s])
        texel = max(near * pixel, max(metres) / 1024, 0.0025)
        w, h = (_round_size(m / texel) for m in metres)
        texel_F[face_id] = texel
        half = 0 if solids.kind_S[s] == BALL else side  # a ball's halves are alike, and so meet without a seam
        image = _paint(scene, s, Face(h, w, texel), light_CHW, np.random.default_rng([*seed, s, half]))
        for level in range(LEVELS):
            h, w = image.shape[:2]
            place[level, face_id], height[level, face_id], width[level, face_id] = end, h, w
            if level == 0 or (h, w) != (height[level - 1, face_id], width[level - 1, face_id]):
                chunks.append(np.ascontiguousarray(image).view(np.uint32).ravel())
                end += h * w
            else:
                place[level, face_id] = place[level - 1, face_id]
            image = _halve(image)
    return Atlas(np.concatenate(chunks), place, height, width, texel_F)


def _round_size(texels: float) -> int:
    """Texels along a side; multiples of eight, so that the first mip levels line up exactly."""
    return max(1, round(texels)) if texels < 16 else 8 * round(texels / 8)


def _halve(image_HWC: np.ndarray) -> np.ndarray:
    for axis in (0, 1):
        n = image_HWC.shape[axis]
        if n > 1:
            even = image_HWC.take(range(0, n - 1, 2), axis).astype(np.uint16)
            image_HWC = ((even + image_HWC.take(range(1, n, 2), axis) + 1) >> 1).astype(np.uint8)
    return image_HWC


def _visible_faces(solids: Solids, eyes_V3: np.ndarray) -> list[tuple[int, int, float]]:
    """(solid, side, distance of the nearest camera) of the faces turned towards some camera."""
    faces = []
    for s, kind in enumerate(solids.kind_S.tolist()):
        local_V3 = (eyes_V3 - solids.centre_S3[s]) @ solids.axes_S33[s].T
        over_V3 = np.maximum(np.abs(local_V3) - solids.half_S3[s], 0)
        for side in sides_of(kind):
            axis, sign = side // 2, 1 - 2 * (side % 2)
            if kind == BALL or (kind == DRUM and side == 0):
                faces.append((s, side, float(np.sqrt((over_V3**2).sum(1)).min())))
                continue
            ahead_V = sign * local_V3[:, axis] - solids.half_S3[s, axis]
            ahead_V = -ahead_V if kind == SHELL else ahead_V
            aside_V = np.delete(over_V3, axis, 1)
            distance_V = np.sqrt(ahead_V**2 + (aside_V**2).sum(1))
            if (ahead_V > 0).any():
                faces.append((s, side, float(distance_V[ahead_V > 0].min())))
    return faces


def _light_faces(scene: Scene, faces: list[tuple[int, int, float]], rng: np.random.Generator) -> list[np.ndarray]:
    """Display-space gain of every face on its own coarse grid: [3, nv, nu]."""
    solids, grids, points, normals = scene.solids, [], [], []
    for s, side, _ in faces:
        nu, nv = (
            int(np.clip(round(m / NODE), 1, 96)) for m in side_size(int(solids.kind_S[s]), side, solids.half_S3[s])
        )
        x, n = face_nodes(solids, s, side, nu, nv)
        grids.append((nv, nu))
        points.append(x)
        normals.append(n)
    casts = np.array([part.glow == 0 for part in scene.parts]) & (solids.kind_S != SHELL)
    light_3N = illuminate(solids, casts, scene.lighting, np.concatenate(points, 1), np.concatenate(normals, 1), rng)
    exposure = 0.55 / np.median(light_3N.mean(0))
    gain_3N = np.sqrt(light_3N * exposure)
    gain_3N /= np.sqrt(np.sqrt(1 + (gain_3N / BRIGHTEST) ** 4))  # right beside a lamp a wall keeps its texture
    out, start = [], 0
    for (nv, nu), (s, _, _) in zip(grids, faces, strict=True):
        gain = gain_3N[:, start : start + nv * nu].reshape(3, nv, nu)
        glow = scene.parts[s].glow
        out.append(_soften(gain) if glow == 0 else np.full((3, 1, 1), glow, np.float32))
        start += nv * nu
    return out


def _soften(grid_CHW: np.ndarray) -> np.ndarray:
    """A 1-2-1 blur both ways: takes the grain of the random shadow rays out."""
    for axis in (1, 2):
        n = grid_CHW.shape[axis]
        before, after = np.maximum(np.arange(n) - 1, 0), np.minimum(np.arange(n) + 1, n - 1)
        grid_CHW = (grid_CHW.take(before, axis) + 2 * grid_CHW + grid_CHW.take(after, axis)) * np.float32(0.25)
    return grid_CHW


def _paint(scene: Scene, s: int, face: Face, gain_CHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One face, lit: [h, w, 4] uint8."""
    part = scene.parts[s]
    thin = min(face.h, face.w) * face.texel < 0.07 and part.edge is not None
    paint = part.edge if thin else part.paint
    kind = int(scene.solids.kind_S[s])
    drawn = Face(face.h, (face.w + 1) // 2, face.texel) if kind == DRUM and face.w > 1 else face
    albedo = MATERIALS[paint.material](rng, drawn, paint.a, paint.b, **paint.options)
    if kind == DRUM and face.w > 1:  # mirrored, so that the mantle closes without a seam
        albedo = np.concatenate([albedo, albedo[:, :, ::-1]], 2)[:, :, : face.w]
    if part.kind != SHELL and part.glow == 0 and kind not in (BALL, DRUM):
        albedo = albedo * worn_edges(face)
    size = (face.w, face.h)
    lit = np.empty((face.h, face.w, 4), np.uint8)
    for c in range(3):
        gain = np.asarray(Image.fromarray(gain_CHW[c]).resize(size, Image.Resampling.BILINEAR))
        value = albedo[c] * gain
        square = value * value
        lit[:, :, c] = (
            value / np.sqrt(np.sqrt(1 + square * square)) * np.float32(255)
        )  # highlights roll off, never clip
    lit[:, :, 3] = 255
    return lit
