"""Batches of images of equal size through an encoder, while the next ones are decoded."""

import os
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmum.data.decode.image import FrameError
from fastmum.data.spread import spread
from fastmum.engine.device import pick_device
from fastmum.features.images import FeaturesError, Images, Placement, Sizing, read_image
from fastmum.features.store import Tokens
from fastmum.model.encoder import Encoder
from fastmum.progress import progress_bar

THREADS = 8  # for decoding; Pillow and torch release Python's lock
AHEAD = 2  # batches decoded ahead
PART = 16  # batches of a task on a Ray cluster
MEMINFO = Path("/proc/meminfo")

Layers = int | Sequence[int] | None


def extract(
    encoder: Encoder, images: Images, sizing: Sizing | None = None, layers: Layers = None, norm: bool = True,
    batch: int = 16, progress: bool = False, ray: str | None = None, ray_device: str = "auto",
) -> dict[str, Tokens]:  # fmt: skip
    """Tokens by names of images, in the order of the files; unreadable images are noted in `images.skipped`.

    FeaturesError: no image can be read, features do not fit in memory (also the device's), or are not finite.
    ValueError: layers that the encoder does not have. On a Ray cluster the same batches are computed, in parts.

    Args:
        encoder: in eval mode, as `fastmum.load_encoder` returns it.
        sizing: None: each image keeps its size as nearly as the patch size permits.
        layers: number of last blocks, or block indices in ascending order; None: the last, without a dimension for it.
        norm: apply the encoder's last norm.
        batch: images of equal size computed together.
        ray: address of a Ray cluster (`fastmum.data.spread.cluster`), to which the encoder is copied from the CPU.
        ray_device: of each task there; a task that is not on the CPU gets a GPU if the cluster has any.
    """
    sizing = sizing or Sizing(encoder.config.patch_size)
    if sizing.size and sizing.fit == "resize":  # whatever the images' sizes
        placements = dict.fromkeys(images.files, sizing.place(*sizing.size))
    else:
        placements = {file: sizing.place(*size) for file, size in images.sizes(progress).items()}
    _check_memory(encoder, placements.values(), layers)
    groups = defaultdict(list)
    for file, placement in placements.items():
        groups[placement[:2]].append(file)
    batches = [group[i : i + batch] for group in groups.values() for i in range(0, len(group), batch)]
    found: dict[str, Tokens] = {}
    if ray is None:
        computed: Iterator[Batch] = _batches(encoder, images.root, layers, norm, batches, placements)
    else:
        parts = [batches[i : i + PART] for i in range(0, len(batches), PART)]
        tasks = [Part(part, {file: placements[file] for files in part for file in files}) for part in parts]
        work = partial(extract_part, encoder, ray_device, images.root, layers, norm)
        gpus, paths = ray_device != "cpu", (images.root,)
        computed = (each for part in spread(work, tasks, ray=ray, paths=paths, gpus=gpus) for each in part)
    with progress_bar(total=len(placements), unit="image", desc="features", show=progress) as bar:
        for files, skipped, cls, patch in computed:
            images.skipped.update(skipped)
            for i, file in enumerate(files):
                name = images.name(file)
                if not patch[i].isfinite().all():
                    cause = f"the weights are damaged, or {patch.dtype} is too narrow"
                    raise FeaturesError(f"features of '{name}' are not finite: {cause}")
                found[name] = Tokens(None if cls is None else cls[i], patch[i], placements[file])
            bar.update(len(files) + len(skipped))
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


class Batch(NamedTuple):
    """Features of images of equal size."""

    files: list[Path]  # those that can be read
    skipped: dict[str, str]  # names of the others, and why
    cls: Tensor | None  # (F, [n,] D)
    patch: Tensor  # (F, [n,] P, D)


class Part(NamedTuple):
    """Batches, and the placements of their files: a task of `extract_part`."""

    batches: list[list[Path]]
    placements: Mapping[Path, Placement]


def extract_part(encoder: Encoder, device: str, root: Path, layers: Layers, norm: bool, part: Part) -> list[Batch]:
    """Features of batches, computed on a device, which the encoder moves to. A picklable task."""
    encoder.to(pick_device(device, key="--device"))
    return list(_batches(encoder, root, layers, norm, *part))


def _batches(
    encoder: Encoder, root: Path, layers: Layers, norm: bool, batches: Sequence[list[Path]],
    placements: Mapping[Path, Placement],
) -> Iterator[Batch]:  # fmt: skip
    device = next(encoder.parameters()).device
    for images, frames in _decoded(batches, placements, root, encoder.mean):
        if frames is None:
            yield Batch([], images.skipped, None, torch.empty(0))
        else:
            yield Batch(images.files, images.skipped, *_tokens(encoder, frames.to(device), layers, norm))


def _tokens(encoder: Encoder, frames: Tensor, layers: Layers, norm: bool) -> tuple[Tensor | None, Tensor]:
    """CLS (F, [n,] D), or None, and patch tokens (F, [n,] P, D) of frames (F, H, W, 3) uint8."""
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
    if layers is None:
        return None if cls is None else cls[:, 0], patch[:, 0]
    return cls, patch


def _decoded(
    batches: Sequence[list[Path]], placements: Mapping[Path, Placement], root: Path, mean: Sequence[float]
) -> Iterator[tuple[Images, Tensor | None]]:
    """The readable files of each batch, why others are not, and frames (F, H, W, 3) uint8, None if there are none."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        pending: deque[list[tuple[Path, Future[np.ndarray]]]] = deque()
        for batch in [*batches, *[[]] * AHEAD]:
            pending.append([(file, pool.submit(read_image, file, placements[file], mean)) for file in batch])
            if len(pending) > AHEAD:
                images, frames = Images(root, []), []
                for file, future in pending.popleft():
                    try:
                        frames.append(torch.from_numpy(future.result()))
                        images.files.append(file)
                    except FrameError as error:
                        images.skipped[images.name(file)] = str(error)
                yield images, torch.stack(frames) if frames else None
