"""Checkpoint manifests, and the checkpoints of a folder ordered by them: file names and times have no meaning."""

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import xxhash
from torch import Tensor

from fastmum.errors import FastmumError, first_line, some_names
from fastmum.files import ABANDONED, free_path, read_json
from fastmum.kernels.adamw import Halves

log = logging.getLogger(__name__)

MANIFEST, METADATA = "checkpoint.json", ".metadata"
PARTIAL = ".partial"
FORMAT = 2
MAX_NAMES = 5  # tensors listed in a message

State = Mapping[str, Tensor | Halves]  # halves are saved as one float32 tensor


class CheckpointError(FastmumError):
    """A checkpoint cannot be used or written."""


class UnreadableError(CheckpointError):
    """A checkpoint is damaged; an older one may be intact."""


def reason(error: BaseException) -> str:
    """The cause of a failure in a few words."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {first_line(error)}"


class TensorSpec(NamedTuple):
    """Global shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor | Halves) -> Self:
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def check(self) -> int:
        """The number of bytes; ValueError: no tensor is like this."""
        dtype = getattr(torch, self.dtype)
        if not isinstance(dtype, torch.dtype) or any(type(size) is not int or size < 0 for size in self.shape):
            raise ValueError(f"{self.dtype} {self.shape}")
        return math.prod(self.shape) * dtype.itemsize


class FileHash(NamedTuple):
    """Size in bytes and XXH3-128."""

    size: int
    xxh3: str

    def missing(self, path: Path) -> str | None:
        """What is wrong with the size of a file, None if it is there with this size."""
        if not path.is_file():  # a pipe would block
            return f"{path.name} is missing"
        size = path.stat().st_size
        return None if size == self.size else f"{path.name} has {size} bytes instead of {self.size}"


@dataclass(frozen=True)
class CheckpointManifest:
    """Contents of the checkpoint in the folder `path`; `values` were passed to `Checkpoints.save`."""

    path: Path
    step: int
    values: dict[str, Any]
    tensors: dict[str, TensorSpec]
    files: dict[str, FileHash]

    def write(self) -> None:
        """Write and fsync the manifest."""
        content = {"format": FORMAT} | {n: getattr(self, n) for n in ("step", "values", "files", "tensors")}
        with open(self.path / MANIFEST, "w", encoding="utf-8") as file:
            file.write(_dump({"xxh3": _hash(content), "content": content}))
            file.flush()
            os.fsync(file.fileno())

    def missing(self) -> str | None:
        """The first file that is not there with its size, and how; None if all are."""
        return next((wrong for name, file in self.files.items() if (wrong := file.missing(self.path / name))), None)

    def check(self) -> None:
        """Check what was read; ValueError or a similar error: it cannot have been written by `write`."""
        if type(self.step) is not int or self.step < 0 or not isinstance(self.values["model_config"], dict):
            raise ValueError("step or model_config")
        if METADATA not in self.files:
            raise ValueError(METADATA)
        for name, file in self.files.items():
            if Path(name).name != name or type(file.size) is not int or file.size < 0:
                raise ValueError(name)
        # Tensors are stored as they are, so nothing is allocated for which there are no files.
        if sum(spec.check() for spec in self.tensors.values()) > sum(file.size for file in self.files.values()):
            raise ValueError("tensors are larger than files")

    def check_model(self, configured: Mapping[str, Any]) -> None:
        """Raise CheckpointError naming the keys of `configured` that differ from those of the saved model."""
        saved = self.values["model_config"]
        wrong = [f"{k} {saved.get(k)} (configured: {v})" for k, v in configured.items() if saved.get(k) != v]
        if wrong:
            raise CheckpointError(
                f"checkpoint '{self.path}' holds another model: {', '.join(wrong)}; "
                "choose another run.dir, or train.resume=never to set the old run aside"
            )

    def check_tensors(self, state: State) -> None:
        """Raise CheckpointError if names or shapes differ from the saved ones; dtypes are converted on load."""
        saved = {name: spec.shape for name, spec in self.tensors.items()}
        ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
        names = sorted(name for name in saved.keys() | ours.keys() if saved.get(name) != ours.get(name))
        wrong = [f"{name} {saved.get(name, 'missing')} (expected: {ours.get(name, 'none')})" for name in names]
        if wrong:
            keys = {"ema.": "train.ema", "exp_avg_sq.": "optim.optimizer"}
            if all(name.startswith(tuple(keys)) for name in names):
                other = [key for prefix, key in keys.items() if any(name.startswith(prefix) for name in names)]
                raise CheckpointError(
                    f"checkpoint '{self.path}' has another {' and '.join(other)}: set it as before, or use another "
                    "run.dir"
                )
            raise CheckpointError(f"checkpoint '{self.path}' does not fit: {some_names(wrong, MAX_NAMES)}")


class FoundCheckpoint(NamedTuple):
    """A checkpoint and its manifest, or why the manifest cannot be read."""

    path: Path
    manifest: CheckpointManifest | None
    problem: str = ""


def find_checkpoints(path: Path) -> list[FoundCheckpoint]:
    """The checkpoints in a folder or run, or the checkpoint `path`; unreadable ones first, then most steps first."""
    if (path / MANIFEST).exists():
        return [_found(path)]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [_found(child) for child in (folder.iterdir() if folder.is_dir() else ()) if _is_checkpoint(child)]
    return sorted(found, key=lambda f: (f.manifest.step if f.manifest else math.inf, f.path.name), reverse=True)


def _is_checkpoint(path: Path) -> bool:
    # .metadata of torch.distributed.checkpoint: a checkpoint that lost its manifest is reported as damaged.
    exists = any((path / name).exists() for name in (MANIFEST, METADATA))
    return exists and PARTIAL not in path.name and ABANDONED not in path.name


def _found(path: Path) -> FoundCheckpoint:
    """Read the manifest, without verifying the other files."""
    try:
        outer = read_json(path / MANIFEST)
        content = outer["content"]
        if _hash(content) != outer["xxh3"]:
            problem = "does not match its hash"
        elif content["format"] != FORMAT:
            problem = f"has format {content['format']}, this fastmum reads {FORMAT}"
        else:
            tensors = {name: TensorSpec(tuple(shape), dtype) for name, (shape, dtype) in content["tensors"].items()}
            files = {name: FileHash(*file) for name, file in content["files"].items()}
            manifest = CheckpointManifest(path, content["step"], content["values"], tensors, files)
            manifest.check()
            return FoundCheckpoint(path, manifest)
    except OSError as error:
        problem = reason(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        problem = "is damaged"
    return FoundCheckpoint(path, None, f"checkpoint '{path}' cannot be read ({MANIFEST}: {problem})")


def set_aside_after(folder: Path, step: int) -> None:
    """Rename damaged checkpoints and those after the step that a run resumes from; called by one rank."""
    for found in find_checkpoints(folder):
        if found.manifest is None or found.manifest.step > step:
            found.path.rename(free_path(found.path.with_name(found.path.name + ABANDONED)))
            why = f"is after step {step}, from which the run resumes" if found.manifest else "cannot be read"
            log.info("'%s' %s and was renamed", found.path, why)


def _dump(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def _hash(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(_dump(content).encode())
