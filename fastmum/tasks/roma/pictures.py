"""Pictures of warps: both images, the second seen from the first, the certainty, and the error next to the truth."""

import numpy as np
from PIL import Image
from torch import Tensor

from fastmum.geometry.warp import warp_image
from fastmum.tasks.pictures import colours, stack, tiles
from fastmum.tasks.roma.decoder import ScaleOutput
from fastmum.tasks.roma.losses import TrueWarp
from fastmum.tasks.roma.scores import pixel_errors

PAIRS = 4  # shown
WORST = 10.0  # pixels of error that are drawn in the last colour


def draw_matches(images: Tensor, found: ScaleOutput, truth: TrueWarp, title: str = "") -> Image.Image:
    """A row for each pair of images (2 B, H, W, 3) uint8, pair after pair, with a warp at full size and its truth."""
    maps = pixel_errors(found.flow, truth.points), truth.visible, found.certainty[:, 0].float().sigmoid()
    rows = []
    for i, (errors, seen, certainty) in enumerate(zip(*(x[:PAIRS].cpu().numpy() for x in maps), strict=True)):
        a, b = images[2 * i : 2 * i + 2].cpu()
        mean = errors[seen].mean() if seen.any() else float("nan")
        rows.append(tiles([
            ("first image", a), ("second image", b), ("second, warped", moved(b, found.flow[i].permute(1, 2, 0))),
            ("certainty", colours(certainty, 0, 1)),
            (f"error, mean {mean:.1f} px", np.where(seen[..., None], colours(errors, 0, WORST), 255)),
        ], 5))  # fmt: skip
    return stack(rows, title)


def moved(image: Tensor, points: Tensor) -> Tensor:
    """An image (H, W, 3) uint8 at the points (h, w, 2) of a warp, in [-1, 1], (h, w, 3) uint8."""
    return warp_image(image, (points.float().cpu() + 1) / 2)
