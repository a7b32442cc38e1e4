"""Pictures of warps (Fig. 7 of the paper), of attention (Fig. 6), and of predictions with more and more views.

Legend: H W pixels, P patches of a frame, G global blocks.
"""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmum.evaluate.attention import attention_maps
from fastmum.evaluate.features import load_image, patch_size
from fastmum.evaluate.pairs import Pair, pair_warp
from fastmum.evaluate.views import ViewBatch, reconstruct
from fastmum.geometry.warp import upsample_warp, warp_image
from fastmum.model.mum import MuM
from fastmum.tasks.mum import reconstructions

GAP = 4  # pixels between pictures
LINE = 14  # pictures are this many times as large as a line of text above them
QUERY, TRUTH = (255, 64, 64), (64, 224, 255)  # colours of the query patch and of its true match
MIN_SIDE = 256  # pixels; smaller pictures are enlarged
FAINT = 0.35  # weight of the picture under the attention


def draw_warp(pair: Pair, points: Tensor, size: int) -> Image.Image:
    """A, B warped onto A by a warp and by the true warp, and B (Fig. 7); white where the true warp does not exist.

    `points` (P, 2) is the warp at the patch centres of A, unit coordinates; `size` the side of a picture in pixels.
    """
    size = max(size, MIN_SIDE)
    side = round(len(points) ** 0.5)
    a, b = (load_image(frame, size) for frame in (pair.a, pair.b))
    moved = warp_image(b, upsample_warp(points.view(side, side, 2).float(), size, size))
    truth = pair_warp(pair, size, size)
    true = warp_image(b, truth.points.view(size, size, 2))
    true[~truth.visible.view(size, size)] = 255
    return labelled_row([("A", a), ("B moved onto A", moved), ("B by the true warp", true), ("B", b)])


def draw_attention(model: MuM, pair: Pair, size: int) -> Image.Image:
    """Attention of a patch of A to the patches of B, in every global block and in their mean (Fig. 6).

    It is the patch of most contrast among those visible in B, where a cross marks it. The model sees `size` pixels.
    """
    seen = torch.stack([load_image(frame, size) for frame in (pair.a, pair.b)])
    maps = attention_maps(model, seen)[:, 0]
    side = size // patch_size(model)
    truth = pair_warp(pair, side, side)
    query = _query(seen[0], truth.visible, side)
    rows_GP = torch.cat([maps[:, query], maps[:, query].mean(0, keepdim=True)])
    a, b = (load_image(frame, max(size, MIN_SIDE)) for frame in (pair.a, pair.b))
    framed, pixels = Image.fromarray(a.numpy()), len(a) / side
    row, column = divmod(query, side)
    box = [column * pixels - 1, row * pixels - 1, (column + 1) * pixels, (row + 1) * pixels]
    ImageDraw.Draw(framed).rectangle(box, outline=QUERY, width=2)
    heats = [_heat(b, each.view(side, side)) for each in rows_GP]
    if truth.visible[query]:
        x, y = (truth.points[query] * len(b)).tolist()
        arm = max(4, len(b) // 32)
        for draw in map(ImageDraw.Draw, heats):
            draw.line([x - arm, y, x + arm, y], fill=TRUTH, width=2)
            draw.line([x, y - arm, x, y + arm], fill=TRUTH, width=2)
    labels = [*(f"block {i}" for i in range(len(maps))), "mean"]
    return labelled_row([("A, query", framed), ("B", b), *zip(labels, heats, strict=True)])


def draw_views(model: MuM, batch: ViewBatch, mask_ratio: float) -> Image.Image:
    """A target, its visible patches, and predictions from it alone, with neighbours, and with unrelated views."""
    output, firsts = reconstruct(model, batch, mask_ratio), batch.firsts
    frames, masked_ids, pred = (x.cpu()[firsts] for x in (batch.frames, output.masked_ids, output.pred.float()))
    masked, predicted = reconstructions(frames, masked_ids, pred)
    related, losses = len(batch.lengths) // 2 + 1, output.loss.cpu()[firsts].tolist()
    labels = [f"{count} view{'s' * (count > 1)}" for count in batch.lengths[:related]]
    labels += [f"{count} unrelated" for count in batch.lengths[related:]]
    named = [(f"{label}: {loss:.3f}", image) for label, loss, image in zip(labels, losses, predicted, strict=True)]
    return labelled_row([("target", frames[0]), ("seen", masked[0]), *named[:related], named[-1]])


def _query(image: Tensor, visible: Tensor, side: int) -> int:
    """The patch of most contrast among side x side, a visible one if there is any."""
    patch = len(image) // side
    contrast = image.float().mean(-1).view(side, patch, side, patch).var((1, 3)).flatten()
    return int(torch.where(visible, contrast, contrast - 1e9).argmax())


def _heat(image: Tensor, values_hw: Tensor) -> Image.Image:
    """A grey picture under the colours of attention, from its minimum to its maximum."""
    import matplotlib

    low, high = values_hw.min(), values_hw.max()
    patches = matplotlib.colormaps["inferno"](((values_hw - low) / (high - low).clamp(min=1e-30)).numpy(), bytes=True)
    height, width = image.shape[:2]
    colours = Image.fromarray(patches[..., :3]).resize((width, height), Image.Resampling.BICUBIC)
    grey = Image.fromarray(image.numpy()).convert("L").convert("RGB")
    return Image.blend(colours, grey, FAINT)


def labelled_row(named: Sequence[tuple[str, Tensor | Image.Image]]) -> Image.Image:
    """Squares side by side, a line of text above each; small ones are enlarged."""
    images = [(name, each if isinstance(each, Image.Image) else Image.fromarray(each.numpy())) for name, each in named]
    size = max(images[0][1].width, MIN_SIDE)
    line = size // LINE
    row = Image.new("RGB", (len(images) * (size + GAP) - GAP, line + size), "white")
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(size=3 * line // 4)
    for i, (name, image) in enumerate(images):
        draw.text((i * (size + GAP) + 2, 1), name, fill="black", font=font)
        if image.width != size:
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        row.paste(image, (i * (size + GAP), line))
    return row
