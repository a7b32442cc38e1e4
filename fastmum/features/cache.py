"""Features of frozen encoders on disk, each computed once: for probes, which read them in every epoch.

A folder for each encoder and description of what is computed, with a file for each image.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from fastmum.errors import writing
from fastmum.features.images import FeaturesError, Placement
from fastmum.features.store import Tokens, read_features, write_features
from fastmum.files import write_atomic
from fastmum.model.encoder import Encoder

log = logging.getLogger(__name__)

NAME = "image"  # of the only image in a file


class FeatureCache:
    """Tokens of a frozen encoder by keys of images.

    `about` describes all that determines them besides the encoder and the images: resizing, blocks, norm, dtype. Keys
    are `image_key` or `file_key` of the images. Processes may share a folder: files are complete or absent.
    """

    def __init__(self, folder: Path, encoder: Encoder, about: Mapping[str, Any]) -> None:
        if encoder.training:
            raise FeaturesError("only features of a frozen encoder can be cached, but this one is in train mode")
        key = {"weights": weights_digest(encoder), **about}
        self.folder = folder / _digest(json.dumps(key, sort_keys=True).encode())
        with writing(self.folder, FeaturesError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "about.json", json.dumps(key | {"encoder": dict(encoder.about)}, indent=1))

    def _file(self, key: str) -> Path:
        return self.folder / f"{_digest(os.fsencode(key))}.safetensors"

    def has(self, key: str) -> bool:
        """Whether there is a file of this key; it may be damaged."""
        return self._file(key).exists()

    def tokens(self, keys: Sequence[str], compute: Callable[[list[int]], Sequence[Tokens]]) -> list[Tokens]:
        """Tokens by keys; `compute` returns those of the missing ones, of which it gets the indices.

        FeaturesError: a file cannot be written. A file that cannot be read is computed again.
        """
        files = [self._file(key) for key in keys]
        found = {i: tokens for i, file in enumerate(files) if file.exists() and (tokens := _read(file))}
        if missing := [i for i in range(len(files)) if i not in found]:
            for i, tokens in zip(missing, compute(missing), strict=True):
                write_features(files[i], {NAME: tokens}, {"key": keys[i].encode(errors="replace").decode()})
                found[i] = tokens
        return [found[i] for i in range(len(files))]


@torch.no_grad()
def frozen_tokens(
    encoder: Encoder, images: Tensor, blocks: Sequence[int], cache: FeatureCache | None = None, norm: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Patch tokens (B, n, P, D) and CLS (B, n, D), or None, after n blocks of a frozen encoder: float16 on the CPU.

    Of the images (B, H, W, 3) uint8, on the CPU, those that `cache` lacks are computed together. `about` of the cache
    must describe `blocks` and `norm`. FeaturesError: features are not finite, or a file cannot be written.
    """

    def compute(missing: Sequence[int]) -> list[Tokens]:
        layers = encoder.tokens(images[missing].to(next(encoder.parameters()).device), blocks, norm=norm)
        patch = torch.stack([layer.patch for layer in layers], 1)
        if not patch.isfinite().all():
            raise FeaturesError("features are not finite: are the weights damaged?")
        patch, classes = half(patch), [layer.cls for layer in layers if layer.cls is not None]
        cls = half(torch.stack(classes, 1)) if classes else None
        place = Placement(*images.shape[1:3], *images.shape[1:3])
        return [Tokens(None if cls is None else cls[i], patch[i], place) for i in range(len(patch))]

    every = list(range(len(images)))
    found = compute(every) if cache is None else cache.tokens([image_key(image) for image in images], compute)
    classes = [tokens.cls for tokens in found if tokens.cls is not None]
    return torch.stack([tokens.patch for tokens in found]), torch.stack(classes) if classes else None


def half(x: Tensor) -> Tensor:
    """float16 on the CPU; the few channels of an encoder that are larger are cut off."""
    limit = torch.finfo(torch.float16).max
    return x.float().clamp(-limit, limit).to("cpu", torch.float16)


def _read(file: Path) -> Tokens | None:
    try:
        return read_features(file)[0][NAME]
    except (FeaturesError, KeyError) as error:
        log.warning("%s: it is computed again", error)
        return None


def image_key(image: Tensor) -> str:
    """The key of an image's pixels, as the encoder gets them: (H, W, 3) uint8 on the CPU."""
    return f"{list(image.shape)} {_digest(image.contiguous().numpy().tobytes())}"


def file_key(file: Path) -> str:
    """The key of an image file that need not be decoded: its path, size and time of modification."""
    stat = file.stat()
    return f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}"


def weights_digest(encoder: Encoder) -> str:
    """A digest of an encoder's weights, sizes and options: equal for equal features, whatever file they are from.

    Caches and files of probes have it; checkpoints have `fastmum.tasks.trained.weights_digest`.
    """
    sizes = [dataclasses.asdict(each) for each in (encoder.config, encoder.options)]
    digest = xxhash.xxh3_128(json.dumps(sizes).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)
