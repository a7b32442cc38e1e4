"""Pictures of pairs: points of view 1 and their epipolar lines in view 2, predicted and true."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastmum.data.scene_loader import SceneBatch
from fastmum.geometry import relative_pose
from fastmum.geometry.camera import rigid_inverse
from fastmum.tasks.pictures import GAP, TEXT, stack
from fastmum.tasks.pose.model import Poses
from fastmum.tasks.pose.scores import errors_of

PAIRS = 4  # shown
SIDE = 320  # pixels: height of an image
POINTS = 3, 2  # columns and rows of points
COLOURS = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))
FAR = 1e5  # pixels: ends of lines, which are nearly parallel to a side


class PairView(NamedTuple):
    """Two images with the predicted pose, and the true one if it is known."""

    name: str
    images: tuple[np.ndarray, np.ndarray]  # (H, W, 3) uint8 each, of any sizes
    K: tuple[np.ndarray, np.ndarray]  # (3, 3) each, pixels
    b_from_a: np.ndarray  # (4, 4), of any length of translation
    true: np.ndarray | None = None  # (4, 4)


def pose_matrix(R: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(4, 4) float64 of a rotation and a translation."""
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, t
    return T


def views_of(batch: SceneBatch, found: Poses) -> list[PairView]:
    """The first pairs of a batch with their predictions, the pose of view 2 in view 1."""
    R, t = (x[1::2].double().cpu().numpy() for x in found)
    T, K, images = batch.camera_from_world.double().numpy(), batch.intrinsics.double().numpy(), batch.images.numpy()
    views = []
    for i, name in enumerate(batch.names[:PAIRS]):
        a, b = 2 * i, 2 * i + 1
        predicted, true = rigid_inverse(pose_matrix(R[i], t[i])), relative_pose(T[a], T[b])
        views.append(PairView(name, (images[a], images[b]), (K[a], K[b]), predicted, true))
    return views


def epipolar_lines(points: np.ndarray, K_a: np.ndarray, K_b: np.ndarray, b_from_a: np.ndarray) -> np.ndarray:
    """Lines a x + b y + c = 0 in pixels of view b, (n, 3), on which points (n, 2) of view a lie."""
    rays = np.c_[points, np.ones(len(points))] @ (b_from_a[:3, :3] @ np.linalg.inv(K_a)).T
    return np.cross(b_from_a[:3, 3], rays) @ np.linalg.inv(K_b)


def draw_pairs(views: list[PairView], title: str = "") -> Image.Image:
    """A row for each pair: predicted lines in the colours of the points, true ones in white."""
    return stack([_draw(view) for view in views], title)


def _draw(view: PairView) -> Image.Image:
    scales = [SIDE / image.shape[0] for image in view.images]
    first, second = (
        Image.fromarray(image).resize((max(1, round(s * image.shape[1])), SIDE))
        for image, s in zip(view.images, scales, strict=True)
    )
    K_a, K_b = (np.diag([s, s, 1.0]) @ K for K, s in zip(view.K, scales, strict=True))
    columns, rows = ((np.arange(n) + 0.5) / n for n in POINTS)
    points = np.stack(np.meshgrid(columns * first.width, rows * SIDE), -1).reshape(-1, 2)
    draw = ImageDraw.Draw(first)
    for (x, y), colour in zip(points, COLOURS, strict=True):
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], colour, "white")
    draw, text = ImageDraw.Draw(second), view.name
    if view.true is not None:
        for line in epipolar_lines(points, K_a, K_b, view.true):
            draw.line(_ends(line, second.size), "white", 1)
        angles = errors_of(view.b_from_a[None, :3, :3], view.b_from_a[None, :3, 3], view.true[None, :3, :3],
                           view.true[None, :3, 3])  # fmt: skip
        text += f": rotation {angles.rotation[0]:.1f}°, direction {angles.direction[0]:.1f}° off"
    for line, colour in zip(epipolar_lines(points, K_a, K_b, view.b_from_a), COLOURS, strict=True):
        draw.line(_ends(line, second.size), colour, 2)
    page = Image.new("RGB", (first.width + GAP + second.width, SIDE + 2 * TEXT), "white")
    ImageDraw.Draw(page).text((GAP, 2), text, "black", ImageFont.load_default(size=TEXT))
    page.paste(first, (0, 2 * TEXT))
    page.paste(second, (first.width + GAP, 2 * TEXT))
    return page


def _ends(line: np.ndarray, size: tuple[int, int]) -> list[float]:
    """Where a line leaves an image on opposite sides, x and y of both; outside for one that is none (translation 0)."""
    a, b, c = line
    width, height = size
    with np.errstate(all="ignore"):
        if abs(b) > abs(a):
            ends = np.array([[0, -c / b], [width, -(c + a * width) / b]])
        else:
            ends = np.array([[-c / a, 0], [-(c + b * height) / a, height]])
    return np.nan_to_num(ends, nan=-FAR).clip(-FAR, FAR).ravel().tolist()
