"""Frozen features of images for recognition: CAPI's transforms, and a stream through the encoder and its cache."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmum.data.decode.image import FrameError, crop_boxes, draw_crops, read_header, rgb
from fastmum.data.errors import DataError
from fastmum.features import FeatureCache, Tokens
from fastmum.features.images import Placement
from fastmum.model.encoder import Encoder
from fastmum.tasks.recognition.files import File

SIZE = 224  # pixels of the encoder's input
RESIZED = 256  # shorter side of an image before its centre is cropped to `SIZE`
CROP_SCALE, CROP_ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of random crops, torchvision's
THREADS, AHEAD = 16, 2  # that decode; batches decoded ahead
BICUBIC = Image.Resampling.BICUBIC

Transform = Callable[[Image.Image], Image.Image]


class View(NamedTuple):
    """An image under a transform, and its label."""

    file: File
    transform: Transform
    name: str  # of the transform, for the cache: everything that it does
    label: Callable[[Image.Image], Any] = lambda image: None  # by the image, of which the header is read


class Batch(NamedTuple):
    """Features of the readable images of a batch, float32, on the encoder's device."""

    cls: Tensor | None  # (B, D)
    patch: Tensor  # (B, N, D)
    labels: list[Any]


def centre(size: int) -> Transform:
    """The centre of size x size pixels of the image at 256 / 224 of that size."""

    def transform(image: Image.Image) -> Image.Image:
        short = round(RESIZED * size / SIZE)
        width, height = (short * side // min(image.size) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return image.resize((width, height), BICUBIC).crop((left, top, left + size, top + size))

    return transform


def squashed(size: int) -> Transform:
    """The whole image, whatever its aspect ratio, at size x size pixels."""
    return lambda image: image.resize((size, size), BICUBIC)


def random_crop(size: int, seed: Sequence[int]) -> Transform:
    """A random crop at size x size pixels, flipped or not: a function of the image's size and the seed."""

    def transform(image: Image.Image) -> Image.Image:
        rng = np.random.default_rng(seed)
        box = crop_boxes(draw_crops(rng, 1, CROP_SCALE, CROP_ASPECT), np.array([image.size]))[0].tolist()
        cropped = image.crop(box).resize((size, size), BICUBIC)
        return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cropped

    return transform


def stream(
    encoder: Encoder, batches: Iterable[Sequence[View]], cache: FeatureCache | None, skipped: dict[str, str]
) -> Iterator[Batch]:
    """Features of batches of images, which are decoded ahead by threads; batches without a readable image are left out.

    Images, or their labels, that cannot be read are skipped: `skipped` gets their paths and the reasons. With a cache,
    features that it has are not computed, and their images are not decoded. DataError: features are not finite.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        pending: deque[list[tuple[View, str, Future]]] = deque()
        for views in chain(batches, [()] * AHEAD):
            pending.append([(view, *_submit(pool, view, cache)) for view in views])
            if len(pending) <= AHEAD or not (current := pending.popleft()):
                continue
            loaded = [(view, key, future.result()) for view, key, future in current]
            skipped |= {view.file.path: found for view, _, found in loaded if isinstance(found, str)}
            good = [(view, key, *found) for view, key, found in loaded if not isinstance(found, str)]
            if good:
                yield _batch(encoder, good, cache)


def _submit(pool: ThreadPoolExecutor, view: View, cache: FeatureCache | None) -> tuple[str, Future]:
    try:
        key = f"{view.file.key()} {view.name}" if cache else ""
    except FrameError:
        key = ""  # reading it will say why
    return key, pool.submit(load, view, not (cache and key and cache.has(key)))


def load(view: View, pixels: bool) -> tuple[Any, np.ndarray | None] | str:
    """The label, and the transformed image (H, W, 3) uint8 if its `pixels` are needed; or why it cannot be read."""
    try:
        header = read_header(view.file.read())
        label = view.label(header.image)
        return label, np.array(view.transform(rgb(header))) if pixels else None
    except (FrameError, DataError) as error:
        return str(error)


def _batch(encoder: Encoder, good: list[tuple[View, str, Any, np.ndarray | None]], cache: FeatureCache | None) -> Batch:
    device = next(encoder.parameters()).device

    def compute(rows: Sequence[int]) -> list[Tokens]:
        images = [x if x is not None else np.array(view.transform(rgb(read_header(view.file.read()))))
                  for view, _, _, x in (good[i] for i in rows)]  # fmt: skip
        with torch.no_grad():
            (tokens,) = encoder.tokens(torch.from_numpy(np.stack(images)).to(device), norm=True)
        if not tokens.patch.isfinite().all():
            raise DataError(f"features of '{good[rows[0]][0].file.path}' are not finite: are the weights damaged?")
        cls: Iterable[Tensor | None] = [None] * len(rows) if tokens.cls is None else tokens.cls
        place = Placement(*images[0].shape[:2], *images[0].shape[:2])
        return [Tokens(c, patch, place) for c, patch in zip(cls, tokens.patch, strict=True)]

    if cache is None:
        found = compute(range(len(good)))
    else:
        found = cache.tokens([key for _, key, _, _ in good], lambda rows: [_on_cpu(each) for each in compute(rows)])
    vectors = [each.cls for each in found if each.cls is not None]
    cls = torch.stack(vectors).to(device).float() if vectors else None
    patch = torch.stack([each.patch for each in found]).to(device).float()
    return Batch(cls, patch, [label for _, _, label, _ in good])


def _on_cpu(tokens: Tokens) -> Tokens:
    return tokens._replace(cls=None if tokens.cls is None else tokens.cls.cpu(), patch=tokens.patch.cpu())
