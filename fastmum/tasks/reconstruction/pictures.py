"""Pictures of reconstructed scenes: depth, errors, cameras and clouds from above, next to the truth."""

from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastmum.data.scene_loader import SceneBatch
from fastmum.geometry.camera import rigid_inverse, transform
from fastmum.tasks.pictures import GAP, TEXT, colours, stack
from fastmum.tasks.reconstruction.camera import decode_cameras
from fastmum.tasks.reconstruction.losses import Prediction, Scene, unproject

FRAMES, SEQUENCES = 4, 3  # shown
SIDE = 160  # pixels: width of a frame
WORST = 0.5  # relative error of depth that is drawn in the last colour
GREY, RED = (200, 200, 200), (214, 39, 40)
ROWS = "image", "true depth", "predicted", "relative error"


class SceneViews(NamedTuple):
    """Frames of a scene with the prediction in the unit and the world of the truth."""

    name: str
    images: np.ndarray  # (F, H, W, 3) uint8
    valid: np.ndarray  # (F, H, W) bool, where the depth is known
    depth: tuple[np.ndarray, np.ndarray]  # true and predicted, (F, H, W) each
    poses: tuple[np.ndarray, np.ndarray]  # camera_from_world, (F, 4, 4) each
    points: tuple[np.ndarray, np.ndarray]  # (F, H, W, 3) each

    @classmethod
    def of_batch(cls, batch: SceneBatch, prediction: Prediction, truth: Scene) -> list[Self]:
        """From training, scene by scene, as the loss compares them: the world is the first camera."""
        H, W = truth.depth.shape[1:]
        T, K = decode_cameras(prediction.cameras[-1].double(), (H, W))
        points = prediction.points
        if points is None:
            points = unproject(prediction.depth.double(), K, T)
        arrays = (
            batch.images, truth.valid, truth.depth, prediction.depth, truth.camera_from_world, T, truth.points, points
        )  # fmt: skip
        parts = (each.detach().cpu().split(batch.lengths) for each in arrays)
        views = []
        for name, *each in zip(batch.names, *parts, strict=True):
            a = [x.numpy() if x.dtype in (torch.uint8, torch.bool) else x.double().numpy() for x in each]
            views.append(cls(name, a[0], a[1], (a[2], a[3]), (a[4], a[5]), (a[6], a[7])))
        return views


def draw_scenes(scenes: list[SceneViews], title: str = "") -> Image.Image:
    """A block for each scene: frames with their depth and its error; cameras and clouds from above."""
    return stack([_draw(scene) for scene in scenes[:SEQUENCES]], title)


def _draw(scene: SceneViews) -> Image.Image:
    H, W = scene.valid.shape[1:]
    shape = max(1, round(SIDE * H / W)), SIDE
    true, found = scene.depth
    known = true[scene.valid] if scene.valid.any() else np.ones(1)
    low, high = np.percentile(known, [2, 98])
    error = np.abs(found - true) / np.maximum(true, 1e-8)
    columns = min(FRAMES, len(true))
    masks, first = scene.valid[:columns, ..., None], slice(columns)
    rows = [
        scene.images[first],
        np.where(masks, colours(true[first], low, high), 255),
        colours(found[first], low, high),
        np.where(masks, colours(error[first], 0, WORST), 255),
    ]
    line, margin, side = 2 * TEXT, 8 * TEXT, 2 * shape[0] + GAP
    middle = margin + columns * (SIDE + GAP)
    page = Image.new("RGB", (middle + 3 * (side + GAP), line + len(rows) * (shape[0] + GAP) + line), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=TEXT)
    mean = error[scene.valid].mean() if scene.valid.any() else np.nan
    draw.text((GAP, 2), f"{scene.name}: mean relative error of depth {mean:.3f}", "black", font)
    for i, (label, row) in enumerate(zip(ROWS, rows, strict=True)):
        y = line + i * (shape[0] + GAP)
        draw.text((GAP, y), label, "black", font)
        for j, image in enumerate(row):
            page.paste(Image.fromarray(np.uint8(image)).resize(shape[::-1]), (margin + j * (SIDE + GAP), y))
    frame = _Above(scene)
    clouds = ("cameras (true grey, predicted red)", None), ("true points", 0), ("predicted points", 1)
    for i, (label, which) in enumerate(clouds):
        panel = frame.cameras(side) if which is None else frame.cloud(side, which)
        page.paste(panel, (middle + i * (side + GAP), line))
        draw.text((middle + i * (side + GAP), line + side), label, "black", font)
    return page


class _Above:
    """The scene from above the first camera, whose view is up in the picture; the truth sets the scale."""

    def __init__(self, scene: SceneViews) -> None:
        self.scene = scene
        first = scene.poses[0][0]
        self.poses = [each @ rigid_inverse(first) for each in scene.poses]
        self.points = [transform(first, each) for each in scene.points]
        centres = rigid_inverse(self.poses[0])[:, :3, 3]
        seen = self.points[0][scene.valid] if scene.valid.any() else centres
        low, high = np.percentile(np.concatenate([seen, np.repeat(centres, 100, 0)])[:, [0, 2]], [2, 98], axis=0)
        self.middle, self.extent = (low + high) / 2, 1.1 * max(*(high - low), 1e-6)

    def pixels(self, points: np.ndarray, side: int) -> np.ndarray:
        """(N, 2) of points (N, 3): x to the right, z up."""
        place = (points[:, [0, 2]] - self.middle) / self.extent
        return np.nan_to_num(side * (0.5 + place * (1, -1)), nan=-1e6).clip(-1e6, 1e6)

    def cameras(self, side: int) -> Image.Image:
        panel = Image.new("RGB", (side, side), (250, 250, 250))
        draw = ImageDraw.Draw(panel)
        for poses, colour in zip(self.poses, (GREY, RED), strict=True):
            world = rigid_inverse(poses)
            centres, ahead = world[:, :3, 3], world[:, :3, 3] + 0.08 * self.extent * world[:, :3, 2]
            for a, b in zip(self.pixels(centres, side), self.pixels(ahead, side), strict=True):
                draw.line([*a, *b], colour, 2)
                draw.ellipse([*(a - 3), *(a + 3)], colour)
        return panel

    def cloud(self, side: int, which: int) -> Image.Image:
        """The points of valid pixels, the highest in front."""
        points, colours = self.points[which][self.scene.valid], self.scene.images[self.scene.valid]
        panel = np.full((side, side, 3), 250, np.uint8)
        order = np.argsort(-points[:, 1])  # y is down
        x, y = np.floor(self.pixels(points[order], side)).astype(np.int64).T
        inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
        panel[y[inside], x[inside]] = colours[order][inside]
        return Image.fromarray(panel)
