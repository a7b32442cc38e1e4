"""The checkpoint manifest: step, tensors, and size and hash of every file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from fastmum.errors import FastmumError
from fastmum.kernels.halves import Halves

MANIFEST = "checkpoint.json"
FORMAT = 2
MAX_NAMES = 8  # tensors listed in a message

State = Mapping[str, Tensor | Halves]  # halves are saved as one float32 tensor


class CheckpointError(FastmumError):
    """A checkpoint cannot be used or written."""


class UnreadableError(CheckpointError):
    """A checkpoint is damaged; an older one may be whole."""


def reason(error: BaseException) -> str:
    """The cause of a failure in a few words."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class TensorSpec(NamedTuple):
    """Global shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor | Halves) -> TensorSpec:
        """The spec of a tensor."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def empty(self) -> Tensor:
        """An uninitialised tensor of this spec on the CPU."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype))


class FileHash(NamedTuple):
    """Size in bytes and XXH3-128 of a file."""

    size: int
    xxh3: str


@dataclass(frozen=True)
class CheckpointManifest:
    """Contents of a checkpoint.

    Args:
        path: folder of the checkpoint.
        values: JSON dict that was passed to `Checkpoints.save`, with the key `model_config`.
        tensors: specs by name.
        files: hashes by file name, without the manifest.
    """

    path: Path
    step: int
    values: dict[str, Any]
    tensors: dict[str, TensorSpec]
    files: dict[str, FileHash]

    def write(self) -> None:
        """Write and fsync the manifest."""
        content = {
            "format": FORMAT, "step": self.step, "values": self.values, "files": self.files, "tensors": self.tensors
        }  # fmt: skip
        with open(self.path / MANIFEST, "w", encoding="utf-8") as file:
            file.write(_dump({"xxh3": _hash(content), "content": content}))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, path: Path) -> CheckpointManifest:
        """Read a manifest, without verifying the other files; UnreadableError if it is missing or damaged."""
        problem = None
        try:
            outer = json.loads((path / MANIFEST).read_bytes())
            content = outer["content"]
            if _hash(content) != outer["xxh3"]:
                problem = "does not match its hash"
            elif content["format"] != FORMAT:
                problem = f"its format is {content['format']}, this fastmum reads {FORMAT}"
        except OSError as error:
            problem = reason(error)
        except (ValueError, KeyError, TypeError):
            problem = "is damaged"
        if problem:
            raise UnreadableError(f"checkpoint '{path}' cannot be read ({MANIFEST}: {problem})")
        return cls(
            path,
            content["step"],
            content["values"],
            {name: TensorSpec(tuple(shape), dtype) for name, (shape, dtype) in content["tensors"].items()},
            {name: FileHash(*file) for name, file in content["files"].items()},
        )

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
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        saved = {name: spec.shape for name, spec in self.tensors.items()}
        wrong = [
            *(f"{name} is missing" for name in sorted(shapes.keys() - saved.keys())),
            *(f"{name} is unexpected" for name in sorted(saved.keys() - shapes.keys())),
            *(
                f"{name} is {list(saved[name])} instead of {list(shape)}"
                for name, shape in shapes.items()
                if saved.get(name, shape) != shape
            ),
        ]
        if wrong:
            more = f" and {len(wrong) - MAX_NAMES} more" if len(wrong) > MAX_NAMES else ""
            raise CheckpointError(f"checkpoint '{self.path}' does not fit: {', '.join(wrong[:MAX_NAMES])}{more}")


def _dump(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def _hash(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(_dump(content).encode())
