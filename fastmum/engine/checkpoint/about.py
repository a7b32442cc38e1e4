"""What a checkpoint says about itself: a manifest beside the files of `torch.distributed.checkpoint`."""

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

from fastmum.engine.checkpoint.errors import CheckpointError, UnreadableError, reason
from fastmum.engine.checkpoint.files import FileAbout
from fastmum.kernels.halves import Halves

MANIFEST = "checkpoint.json"
FORMAT = 1
NAMED = 5  # tensors listed in a message

State = Mapping[str, Tensor | Halves]  # what is kept in halves is a float32 tensor in every checkpoint


class TensorAbout(NamedTuple):
    """Global shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor | Halves) -> TensorAbout:
        """Those of a tensor, sharded, in halves or neither."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def empty(self) -> Tensor:
        """A tensor like it on the CPU."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype))


@dataclass(frozen=True)
class About:
    """One checkpoint.

    Args:
        path: its folder.
        values: what was handed to `Checkpoints.save`, JSON.
        tensors: by name.
        files: that it consists of, the manifest excepted.
    """

    path: Path
    step: int
    values: dict[str, Any]
    tensors: dict[str, TensorAbout]
    files: dict[str, FileAbout]

    @property
    def model_config(self) -> dict[str, Any]:
        """Sizes of the model that it holds."""
        return self.values["model_config"]

    def write(self) -> None:
        """Write the manifest and put it on disk.

        Raises:
            OSError: it cannot be written.
        """
        content = {
            "format": FORMAT,
            "step": self.step,
            "about": self.values,
            "files": self.files,
            "tensors": self.tensors,
        }
        with open(self.path / MANIFEST, "w", encoding="utf-8") as file:
            file.write(_dump({"xxh3": _hash(content), "content": content}))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, path: Path) -> About:
        """The manifest of the checkpoint in a folder; its other files are not looked at.

        Raises:
            UnreadableError: there is none, it is damaged, or of another version of fastmum.
        """
        try:
            outer = json.loads((path / MANIFEST).read_bytes())
            content = outer["content"]
            if _hash(content) != outer["xxh3"]:
                raise UnreadableError(f"{MANIFEST} has other content than was written")
            if content["format"] != FORMAT:
                raise UnreadableError(f"its format is {content['format']}, this fastmum reads {FORMAT}")
        except UnreadableError as error:
            raise UnreadableError(f"checkpoint '{path}' cannot be read ({error})") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = reason(error) if isinstance(error, OSError) else "it is damaged"
            raise UnreadableError(f"checkpoint '{path}' cannot be read ({MANIFEST}: {why})") from None
        return cls(
            path,
            content["step"],
            content["about"],
            {name: TensorAbout(tuple(shape), dtype) for name, (shape, dtype) in content["tensors"].items()},
            {name: FileAbout(*file) for name, file in content["files"].items()},
        )

    def check_model(self, configured: Mapping[str, Any]) -> None:
        """Compare sizes of the model.

        Raises:
            CheckpointError: it holds a model of other sizes; the message says which.
        """
        other = [
            f"{key} {self.model_config.get(key)} (configured: {value})"
            for key, value in configured.items()
            if self.model_config.get(key) != value
        ]
        if other:
            raise CheckpointError(
                f"checkpoint '{self.path}' holds another model: {', '.join(other)}; "
                "choose another run.dir, or train.resume=never to set the old run aside"
            )

    def check_tensors(self, state: State) -> None:
        """Compare names and shapes; a dtype that differs is converted when loading.

        Raises:
            CheckpointError: they differ; the message says where.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        wrong = [
            f"{name} is {list(self.tensors[name].shape)} (ours: {list(shape)})"
            for name, shape in shapes.items()
            if name in self.tensors and self.tensors[name].shape != shape
        ]
        findings = [
            ("lacks", sorted(shapes.keys() - self.tensors.keys())),
            ("has besides", sorted(self.tensors.keys() - shapes.keys())),
            ("has in other shapes", wrong),
        ]
        differences = [f"{what} {_some(names)}" for what, names in findings if names]
        if differences:
            raise CheckpointError(f"checkpoint '{self.path}' does not fit: it {'; '.join(differences)}")


def _dump(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def _hash(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(_dump(content).encode())


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
