"""Batches of images of one size through an encoder, while the next are decoded."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastmum.data.decode.image import FrameError
from fastmum.features.errors import FeaturesError
from fastmum.features.images import Images, Placement, Sizing, read_image
from fastmum.features.memory import available_memory
from fastmum.model.encoder import Encoder

THREADS = 8  # that decode; Pillow and torch release Python's lock
AHEAD = 2  # batches that are decoded while one is computed


class Tokens(NamedTuple):
    """Features of an image, on the CPU.

    Args:
        cls: (D,), or (n, D) where several layers were asked for.
        patch: (P, D) or (n, P, D), patches row by row.
        placement: how the image lay in what the encoder saw.
    """

    cls: Tensor
    patch: Tensor
    placement: Placement


def extract(
    encoder: Encoder,
    images: Images,
    sizing: Sizing | None = None,
    layers: int | Sequence[int] | None = None,
    norm: bool = True,
    batch: int = 16,
    progress: bool = False,
) -> dict[str, Tokens]:
    """Features of images; those that cannot be read are skipped and noted in `images.skipped`.

    Args:
        encoder: in eval mode, as `fastmum.load_pretrained` returns it.
        images: of `find_images`.
        sizing: None: each image keeps its size as nearly as the patch size permits.
        layers: the last so many blocks, or their numbers from 0, in ascending order; None: the last, without a
            dimension for it.
        norm: apply the encoder's last norm.
        batch: images computed at once; only those of one size are.
        progress: draw a bar.

    Returns:
        Tokens by names of images, in the order of the files.

    Raises:
        FeaturesError: no image can be read, features of all images do not fit in memory, the device's memory is too
            small, or features are not finite.
        ValueError: layers that the encoder does not have.
    """
    sizing = sizing or Sizing(encoder.config.patch_size)
    sizes = images.sizes()
    placements = {file: sizing.place(*size) for file, size in sizes.items()}
    _check_memory(encoder, placements.values(), layers)
    device = encoder.cls_token.device
    found: dict[str, Tokens] = {}
    with tqdm(total=len(placements), unit="image", desc="features", disable=not progress) as bar:
        for files, frames in _decoded(_batches(placements, batch), placements, images):
            if len(files):
                for file, cls, patch in zip(files, *_tokens(encoder, frames.to(device), layers, norm), strict=True):
                    if not patch.isfinite().all():
                        raise FeaturesError(
                            f"features of '{images.name(file)}' are not finite: the weights are damaged, or "
                            f"{patch.dtype} is too narrow for them"
                        )
                    found[images.name(file)] = Tokens(cls, patch, placements[file])
            bar.update(len(files))
    if not found:
        name, why = next(iter(images.skipped.items()))
        raise FeaturesError(f"none of {len(images.files)} images can be read; the first is '{name}' ({why})")
    return {name: found[name] for name in map(images.name, images.files) if name in found}


def _check_memory(encoder: Encoder, placements: Collection[Placement], layers: int | Sequence[int] | None) -> None:
    """Look whether features of all images, which are kept until they are written, fit in memory.

    Raises:
        FeaturesError: they do not.
    """
    count = 1 if layers is None else layers if isinstance(layers, int) else len(layers)
    p = encoder.config.patch_size
    tokens = sum(1 + (place.height // p) * (place.width // p) for place in placements)
    needed = count * tokens * encoder.config.embed_dim * encoder.cls_token.element_size()
    there = available_memory()
    if there is not None and needed > there:
        raise FeaturesError(
            f"features of {len(placements)} images take {needed / 1e9:.1f} GB, but {there / 1e9:.1f} GB of memory are "
            "available: take a smaller --size or --max-side, --dtype bfloat16, fewer --layers, or fewer images"
        )


def _tokens(encoder: Encoder, frames: Tensor, layers: int | Sequence[int] | None, norm: bool) -> tuple[Tensor, Tensor]:
    """CLS (F, [n,] D) and patch tokens (F, [n,] P, D) of frames (F, H, W, 3) uint8."""
    try:
        with torch.inference_mode():
            outputs = encoder.get_intermediate_layers(
                frames, 1 if layers is None else layers, return_class_token=True, norm=norm
            )
            patch, cls = (torch.stack(parts, dim=1).cpu() for parts in zip(*outputs, strict=True))
    except torch.OutOfMemoryError:
        raise FeaturesError(
            f"memory is too small for {len(frames)} images of {frames.shape[1]} x {frames.shape[2]} pixels at once: "
            "take smaller batches or images"
        ) from None
    return (cls[:, 0], patch[:, 0]) if layers is None else (cls, patch)


def _batches(placements: Mapping[Path, Placement], batch: int) -> list[list[Path]]:
    """Files whose images get the same size, at most `batch` together."""
    groups = defaultdict(list)
    for file, placement in placements.items():
        groups[placement[:2]].append(file)
    return [group[i : i + batch] for group in groups.values() for i in range(0, len(group), batch)]


def _decoded(
    batches: Sequence[list[Path]], placements: Mapping[Path, Placement], images: Images
) -> Iterator[tuple[list[Path], Tensor]]:
    """The files of each batch that could be decoded, and their frames (F, H, W, 3) uint8."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        waiting: deque[list[tuple[Path, Future[np.ndarray]]]] = deque()
        for files in [*batches, *[[]] * AHEAD]:
            waiting.append([(file, pool.submit(read_image, file, placements[file])) for file in files])
            if len(waiting) > AHEAD:
                yield _collect(waiting.popleft(), images)


def _collect(futures: Sequence[tuple[Path, Future[np.ndarray]]], images: Images) -> tuple[list[Path], Tensor]:
    files, frames = [], []
    for file, future in futures:
        try:
            frames.append(torch.from_numpy(future.result()))
            files.append(file)
        except FrameError as error:
            images.skipped[images.name(file)] = str(error)
    return files, torch.stack(frames) if frames else torch.empty(0)
