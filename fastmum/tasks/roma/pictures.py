"""Pictures of warps: both images, the second seen from the first, the certainty, and the error next to the truth."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmum.geometry.warp import warp_image
from fastmum.tasks.roma.decoder import ScaleOutput
from fastmum.tasks.roma.losses import TrueWarp
from fastmum.tasks.roma.scores import pixel_errors

PAIRS = 4  # shown
SIDE, GAP, TEXT = 200, 4, 13  # pixels: of an image, between images, of text
WORST = 10.0  # pixels of error that are drawn in the last colour


def draw_matches(images: Tensor, found: ScaleOutput, truth: TrueWarp, title: str = "") -> Image.Image:
    """A row for each pair of images (2 B, H, W, 3) uint8, pair after pair, with a warp at full size and its truth."""
    errors = pixel_errors(found.flow, truth.points).cpu()
    named = []
    for i in range(min(PAIRS, len(errors))):
        a, b = images[2 * i].cpu(), images[2 * i + 1].cpu()
        certainty = found.certainty[i, 0].float().sigmoid().cpu()
        seen = truth.visible[i].cpu()
        error = torch.where(seen, errors[i], torch.nan)
        mean = errors[i][seen].mean().item() if seen.any() else float("nan")
        named += [
            ("first image", a), ("second image", b), ("second, warped", moved(b, found.flow[i])),
            ("certainty", colours(certainty, 1.0)), (f"error, mean {mean:.1f} px", colours(error, WORST)),
        ]  # fmt: skip
    return tiles(named, len(named) // min(PAIRS, len(errors)), title)


def moved(image: Tensor, flow: Tensor) -> Tensor:
    """An image (H, W, 3) uint8 at the points of a warp (2, h, w) in [-1, 1], (h, w, 3) uint8."""
    return warp_image(image, (flow.float().cpu().permute(1, 2, 0) + 1) / 2)


def colours(values: Tensor, largest: float) -> Tensor:
    """Values (h, w) from 0 to `largest` as colours, white where they are NaN."""
    from matplotlib import colormaps

    shares = (values / largest).clamp(0, 1).numpy()
    mapped = colormaps["turbo"](np.nan_to_num(shares), bytes=True)[..., :3]
    return torch.from_numpy(np.where(np.isnan(shares)[..., None], np.uint8(255), mapped))


def tiles(named: list[tuple[str, Tensor]], columns: int, title: str = "") -> Image.Image:
    """Images (h, w, 3) uint8 with their names below, in rows."""
    rows, top, step = -(-len(named) // columns), 2 * TEXT if title else 0, SIDE + 2 * TEXT
    page = Image.new("RGB", (columns * (SIDE + GAP), top + rows * step), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=TEXT)
    draw.text((GAP, 2), title, "black", font)
    for i, (name, image) in enumerate(named):
        x, y = i % columns * (SIDE + GAP), top + i // columns * step
        page.paste(Image.fromarray(image.numpy()).resize((SIDE, SIDE)), (x, y))
        draw.text((x + GAP, y + SIDE), name, "black", font)
    return page
