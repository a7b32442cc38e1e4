"""What a teacher predicts for frames, and a cache of it on disk: 8 bytes a pixel with points, 2 without.

A file for each sequence of frames; its name is the digest of the pixels, as the student gets them, and a folder for
each teacher. Maps are float16, rounded in the same way whether they are computed or read.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastmum.errors import FastmumError, first_line, writing
from fastmum.files import write_atomic

log = logging.getLogger(__name__)

MAPS = torch.float16


class TargetsError(FastmumError):
    """A cache that cannot be written."""


class Targets(NamedTuple):
    """Outputs of a teacher for packed sequences, in the student's size."""

    cameras: Tensor  # (F, 9), its last refinement (`encode_cameras`)
    depth: Tensor  # (F, H, W)
    points: Tensor | None  # (F, H, W, 3), in the axes of the first camera of the sequence


class TargetCache:
    """Outputs of a teacher by frames; `about` is all else that determines them, such as the digest of its weights.

    Processes may share a folder: files are complete or absent.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        content = json.dumps(about, sort_keys=True, indent=1)
        self.folder = folder / xxhash.xxh3_128_hexdigest(content.encode())
        self._points = bool(about.get("points", True))
        self.frames = self.bytes = self.computed = 0
        with writing(self.folder, TargetsError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "about.json", content)

    def targets(self, images: Tensor, lengths: Sequence[int], compute: Callable[[], Targets]) -> Targets:
        """Outputs for frames (F, H, W, 3) uint8 on the CPU; if those of a sequence are missing, `compute` returns all.

        TargetsError: a file cannot be written. A file that cannot be read is computed again.
        """
        parts = images.split(tuple(lengths))
        files = [self.folder / f"{_digest(part)}.safetensors" for part in parts]
        found = [self._read(file) for file in files]
        if any(each is None for each in found):
            whole = compute()
            split = [[None] * len(parts) if x is None else x.split(tuple(lengths)) for x in whole]
            for i, each in enumerate(zip(*split, strict=True)):
                found[i] = rounded = _rounded(Targets(*each))
                self._write(files[i], rounded)
        self.frames, self.bytes = self.frames + len(images), self.bytes + sum(f.stat().st_size for f in files)
        return Targets(*(None if x[0] is None else torch.cat(x) for x in zip(*found, strict=True)))  # type: ignore

    def summary(self) -> str:
        """How many frames were asked for, and the size of a frame."""
        return f"{self.frames} frames, {self.bytes / max(1, self.frames) / 1e6:.2f} MB each, {self.folder}"

    def _read(self, file: Path) -> Targets | None:
        try:
            tensors = load(file.read_bytes())
            return Targets(
                tensors["cameras"], tensors["depth"].float(), tensors["points"].float() if self._points else None
            )
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            log.warning("'%s' cannot be read (%s): it is computed again", file, first_line(error))
            return None

    def _write(self, file: Path, targets: Targets) -> None:
        maps = {"depth": targets.depth} | ({} if targets.points is None else {"points": targets.points})
        tensors = {"cameras": targets.cameras.contiguous()} | {
            name: x.to(MAPS).contiguous() for name, x in maps.items()
        }
        with writing(file, TargetsError):
            write_atomic(file, save(tensors))


def _rounded(targets: Targets) -> Targets:
    cameras, depth, points = targets
    return Targets(cameras, depth.to(MAPS).float(), None if points is None else points.to(MAPS).float())


def _digest(images: Tensor) -> str:
    content = xxhash.xxh3_128(str(list(images.shape)).encode())
    content.update(images.contiguous().numpy().data)
    return content.hexdigest()
