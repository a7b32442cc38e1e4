"""Batches of images of equal size through an encoder, while the next ones are decoded."""

import os
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmum.data.decode.image import FrameError
from fastmum.features.images import FeaturesError, Images, Placement, Sizing, read_image
from fastmum.features.store import Tokens
from fastmum.model.encoder import Encoder
from fastmum.progress import progress_bar

THREADS = 8  # for decoding; Pillow and torch release Python's lock
AHEAD = 2  # batches decoded ahead
MEMINFO = Path("/proc/meminfo")

Layers = int | Sequence[int] | None


def extract(
    encoder: Encoder, images: Images, sizing: Sizing | None = None, layers: Layers = None, norm: bool = True,
    batch: int = 16, progress: bool = False,
) -> dict[str, Tokens]:  # fmt: skip
    """Tokens by names of images, in the order of the files; unreadable images are noted in `images.skipped`.

    FeaturesError: no image can be read, features do not fit in memory (also the device's), or are not finite.
    ValueError: layers that the encoder does not have.

    Args:
        encoder: in eval mode, as `fastmum.load_encoder` returns it.
        sizing: None: each image keeps its size as nearly as the patch size permits.
        layers: number of last blocks, or block indices in ascending order; None: the last, without a dimension for it.
        norm: apply the encoder's last norm.
        batch: images of equal size computed together.
    """
    sizing = sizing or Sizing(encoder.config.patch_size)
    placements = {file: sizing.place(*size) for file, size in images.sizes().items()}
    _check_memory(encoder, placements.values(), layers)
    device, groups = next(encoder.parameters()).device, defaultdict(list)
    for file, placement in placements.items():
        groups[placement[:2]].append(file)
    batches = [group[i : i + batch] for group in groups.values() for i in range(0, len(group), batch)]
    found: dict[str, Tokens] = {}
    with progress_bar(total=len(placements), unit="image", desc="features", show=progress) as bar:
        for files, frames in _decoded(batches, placements, images, encoder.mean):
            if frames is not None:
                for file, cls, patch in zip(files, *_tokens(encoder, frames.to(device), layers, norm), strict=True):
                    name = images.name(file)
                    if not patch.isfinite().all():
                        cause = f"the weights are damaged, or {patch.dtype} is too narrow"
                        raise FeaturesError(f"features of '{name}' are not finite: {cause}")
                    found[name] = Tokens(cls, patch, placements[file])
            bar.update(len(files))
    if not found:
        name, why = next(iter(images.skipped.items()))
        raise FeaturesError(f"none of {len(images.files)} images can be read; the first is '{name}' ({why})")
    return {name: found[name] for name in map(images.name, images.files) if name in found}


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping (not on Linux: all memory); None: unknown."""
    try:  # unlike free pages, it includes caches
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _check_memory(encoder: Encoder, placements: Collection[Placement], layers: Layers) -> None:
    """Raise FeaturesError if the features of all images, which are kept until they are saved, do not fit in memory."""
    count = 1 if layers is None else layers if isinstance(layers, int) else len(layers)
    p = encoder.config.patch_size
    cls, dtype = encoder.options.cls, next(encoder.parameters()).dtype
    tokens = sum(cls + (place.height // p) * (place.width // p) for place in placements)
    needed = count * tokens * encoder.config.embed_dim * dtype.itemsize
    available = available_memory()
    if available is not None and needed > available:
        sizes = f"take {needed / 1e9:.1f} GB, but {available / 1e9:.1f} GB of memory are available"
        remedy = "use a smaller --size or --max-side, --dtype bfloat16, fewer --layers, or fewer images"
        raise FeaturesError(f"features of {len(placements)} images {sizes}: {remedy}")


def _tokens(
    encoder: Encoder, frames: Tensor, layers: Layers, norm: bool
) -> tuple[Sequence[Tensor | None], list[Tensor]]:
    """CLS (F, [n,] D), or None for each, and patch tokens (F, [n,] P, D) of frames (F, H, W, 3) uint8."""
    try:
        with torch.inference_mode():
            n = 1 if layers is None else layers
            outputs = encoder.get_intermediate_layers(frames, n, return_class_token=True, norm=norm)
            patches, tokens = zip(*outputs, strict=True)
            patch = torch.stack(patches, dim=1).cpu()
            cls = torch.stack(tokens, dim=1).cpu() if encoder.options.cls else None
    except torch.OutOfMemoryError:
        size = f"{len(frames)} images of {frames.shape[1]} x {frames.shape[2]} pixels"
        raise FeaturesError(f"the device's memory is too small for {size}: lower --batch or --size") from None
    one = layers is None
    found = [None] * len(frames) if cls is None else list(cls[:, 0] if one else cls)
    return found, list(patch[:, 0] if one else patch)


def _decoded(
    batches: Sequence[list[Path]], placements: Mapping[Path, Placement], images: Images, mean: Sequence[float]
) -> Iterator[tuple[list[Path], Tensor | None]]:
    """The readable files of each batch and their frames (F, H, W, 3) uint8, or None if there are none."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        pending: deque[list[tuple[Path, Future[np.ndarray]]]] = deque()
        for batch in [*batches, *[[]] * AHEAD]:
            pending.append([(file, pool.submit(read_image, file, placements[file], mean)) for file in batch])
            if len(pending) > AHEAD:
                frames = {}
                for file, future in pending.popleft():
                    try:
                        frames[file] = torch.from_numpy(future.result())
                    except FrameError as error:
                        images.skipped[images.name(file)] = str(error)
                yield list(frames), torch.stack(list(frames.values())) if frames else None
