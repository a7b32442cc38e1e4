"""Pictures of warps (Fig. 7 of the paper), of attention (Fig. 6), and of predictions with more and more views.

Legend: H W pixels, h w patches, N pairs, P patches of a frame, G global blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmum.evaluate.attention import attention_maps
from fastmum.evaluate.features import load_image, patch_size
from fastmum.evaluate.pairs import Pair
from fastmum.evaluate.views import Shown, reconstruct
from fastmum.evaluate.warp import finer, move, pair_warp
from fastmum.model.mum import MuM
from fastmum.tasks.mum_pictures import reconstructions

GAP, LABEL = 4, 18  # pixels between pictures, height of a line of text
QUERY, TRUTH = (255, 64, 64), (64, 224, 255)  # colours of the query patch and of its true match
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # from nothing to most attention
SHOWN = 256  # pixels a side at least
FAINT = 0.35  # brightness of the picture under the heat


def draw_warp(pair: Pair, points: Tensor, size: int) -> Image.Image:
    """A, B moved onto A by a warp, B moved by the true warp, and B (Fig. 7).

    Args:
        pair: the pair.
        points: (P, 2) the warp at the patch centres of A, unit coordinates.
        size: side of each picture in pixels; small ones are drawn larger.

    Returns:
        Four squares with a line of text above each; what the true warp does not reach is white.
    """
    size = max(size, SHOWN)
    side = round(len(points) ** 0.5)
    a, b = (load_image(frame, size) for frame in (pair.a, pair.b))
    moved = move(b, finer(points.view(side, side, 2).float(), size, size))
    truth = pair_warp(pair, size, size)
    true = move(b, truth.points.view(size, size, 2))
    true[~truth.visible.view(size, size)] = 255
    return _row([("A", a), ("B moved onto A", moved), ("B by the true warp", true), ("B", b)])


def draw_attention(model: MuM, pair: Pair, size: int) -> Image.Image:
    """The attention of one patch of A to the patches of B, in every global block and in their mean (Fig. 6).

    The patch is the most contrasted of those that B sees, too; a cross is where it truly is in B.

    Args:
        model: with its decoder.
        pair: the pair.
        size: side in pixels that the model sees; small pictures are drawn larger.
    """
    seen = torch.stack([load_image(frame, size) for frame in (pair.a, pair.b)])
    maps = attention_maps(model, seen)[:, 0]
    side = size // patch_size(model)
    truth = pair_warp(pair, side, side)
    query = _query(seen[0], truth.visible, side)
    place = truth.points[query] if truth.visible[query] else None
    rows_GP = torch.cat([maps[:, query], maps[:, query].mean(0, keepdim=True)])
    a, b = (load_image(frame, max(size, SHOWN)) for frame in (pair.a, pair.b))
    labels = [*(f"block {i}" for i in range(len(maps))), "mean"]
    heats = [_cross(_heat(b, each.view(side, side)), place) for each in rows_GP]
    return _row([("A, query", _framed(a, query, side)), ("B", b), *zip(labels, heats, strict=True)])


def draw_views(model: MuM, batch: Shown, mask_ratio: float) -> Image.Image:
    """A target, what of it is seen, and what is predicted from it alone, with neighbours, and with unrelated views.

    Args:
        model: with its decoder.
        batch: of the target.
        mask_ratio: of every frame.
    """
    output = reconstruct(model, batch, mask_ratio)
    firsts = batch.firsts
    frames, masked_ids, pred = (x.cpu()[firsts] for x in (batch.frames, output.masked_ids, output.pred.float()))
    masked, predicted = reconstructions(frames, masked_ids, pred)
    related = len(batch.lengths) // 2 + 1
    labels = [
        *(f"{count} view{'s' * (count > 1)}" for count in batch.lengths[:related]),
        *(f"{count} unrelated" for count in batch.lengths[related:]),
    ]
    losses = output.loss.cpu()[firsts].tolist()
    named = [(f"{label}: {loss:.3f}", image) for label, loss, image in zip(labels, losses, predicted, strict=True)]
    shown = [("target", frames[0]), ("seen", masked[0]), *named[:related], named[-1]]
    return _row([(label, _enlarged(image)) for label, image in shown])


def _enlarged(image: Tensor) -> Image.Image:
    side = max(image.shape[0], SHOWN)
    return Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.LANCZOS)


def _framed(image: Tensor, query: int, side: int) -> Image.Image:
    """A picture with a frame round one of side x side patches."""
    framed, pixels = Image.fromarray(image.numpy()), len(image) / side
    row, column = divmod(query, side)
    box = [column * pixels - 1, row * pixels - 1, (column + 1) * pixels, (row + 1) * pixels]
    ImageDraw.Draw(framed).rectangle(box, outline=QUERY, width=2)
    return framed


def _query(image: Tensor, visible: Tensor, side: int) -> int:
    """The patch of most contrast of side x side, among the visible ones if there are any."""
    patch = len(image) // side
    patches = image.float().mean(-1).view(side, patch, side, patch)
    contrast = patches.var((1, 3)).flatten()
    return int(torch.where(visible, contrast, contrast - 1e9).argmax())


def _heat(image: Tensor, values_hw: Tensor) -> Image.Image:
    """A picture in grey under colours of attention, from its least to its most."""
    span = values_hw.max() - values_hw.min()
    share = ((values_hw - values_hw.min()) / span.clamp(min=1e-30)).numpy()
    bands = [np.interp(share, np.linspace(0, 1, len(HEAT)), channel) for channel in zip(*HEAT, strict=True)]
    patches = Image.fromarray(np.stack(bands, -1).round().astype(np.uint8))
    colours = patches.resize(image.shape[1::-1], Image.Resampling.BICUBIC)
    grey = image.float().mean(-1, keepdim=True).expand(-1, -1, 3)
    mixed = FAINT * grey + (1 - FAINT) * torch.from_numpy(np.array(colours)).float()
    return Image.fromarray(mixed.round().clamp(0, 255).to(torch.uint8).numpy())


def _cross(image: Image.Image, place: Tensor | None) -> Image.Image:
    if place is not None:
        x, y = (float(unit) * side for unit, side in zip(place, image.size, strict=True))
        draw, arm = ImageDraw.Draw(image), max(4, image.width // 32)
        draw.line([x - arm, y, x + arm, y], fill=TRUTH, width=2)
        draw.line([x, y - arm, x, y + arm], fill=TRUTH, width=2)
    return image


def _row(named: list[tuple[str, Tensor | Image.Image]]) -> Image.Image:
    """Squares side by side, a line of text above each."""
    images = [(name, each if isinstance(each, Image.Image) else Image.fromarray(each.numpy())) for name, each in named]
    size = images[0][1].width
    row = Image.new("RGB", (len(images) * (size + GAP) - GAP, LABEL + size), "white")
    draw, font = ImageDraw.Draw(row), ImageFont.load_default()
    for i, (name, image) in enumerate(images):
        draw.text((i * (size + GAP) + 2, 3), name, fill="black", font=font)
        row.paste(image, (i * (size + GAP), LABEL))
    return row
