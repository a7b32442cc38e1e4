"""Checkpoints read: found, verified to the last byte, compared with what they are for, put into place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from fastmum.engine.checkpoint.about import About, State
from fastmum.engine.checkpoint.errors import CheckpointError, UnreadableError
from fastmum.engine.checkpoint.files import damage
from fastmum.engine.checkpoint.folder import find_checkpoints
from fastmum.engine.checkpoint.parts import read_parts
from fastmum.engine.checkpoint.ranks import Ranks

log = logging.getLogger(__name__)

class Weights(NamedTuple):
    """The model of a checkpoint.

    Args:
        about: the checkpoint.
        tensors: a state dict, float32 on the CPU.
    """

    about: About
    tensors: dict[str, Tensor]


def load_newest(
    path: Path, state: State, model_config: Mapping[str, Any], group: dist.ProcessGroup | None = None
) -> About | None:
    """Fill `state` in place from the newest checkpoint that is whole; None where there is none at all.

    Args:
        path: a checkpoint, a folder of checkpoints, or a run.
        state: of the names and global shapes that were saved, sharded in any way.
        model_config: sizes of our model.
        group: all ranks, over gloo; None: a single process.

    Raises:
        CheckpointError: none is whole, or the newest that is holds another model or other tensors.
    """
    ranks = Ranks(group)

    def fill(about: About) -> None:
        about.check_model(model_config)
        ranks.each(lambda: about.check_tensors(state))
        _read(about, state, ranks)

    return _newest(path, fill, ranks, remedy="; train.resume=never sets the run aside")


def load_checkpoint(
    path: Path, state: State, model_config: Mapping[str, Any], group: dist.ProcessGroup | None = None
) -> About:
    """As `load_newest`, where there must be one.

    Raises:
        CheckpointError: there is none, and as there.
    """
    about = load_newest(path, state, model_config, group)
    if about is None:
        raise _none(path)
    return about


def read_weights(path: Path, prefix: str = "model.") -> Weights:
    """Read the tensors named `prefix`* of the newest whole checkpoint, in this process only.

    Args:
        path: a checkpoint, a folder of checkpoints, or a run.
        prefix: removed from the names.

    Raises:
        CheckpointError: there is none.
    """
    weights: dict[str, Tensor] = {}

    def read(about: About) -> None:
        weights.clear()
        weights.update({name: spec.empty() for name, spec in about.tensors.items() if name.startswith(prefix)})
        _read(about, weights, alone)

    alone = Ranks(None)
    about = _newest(path, read, alone)
    if about is None:
        raise _none(path)
    return Weights(about, {name.removeprefix(prefix): tensor for name, tensor in weights.items()})


def _newest(path: Path, use: Callable[[About], None], ranks: Ranks, remedy: str = "") -> About | None:
    """The newest checkpoint that `use` does not find damaged."""
    found = ranks.first(lambda: find_checkpoints(path))
    for candidate in found:
        try:
            if candidate.about is None:
                raise UnreadableError(candidate.problem)
            use(candidate.about)
        except UnreadableError as error:
            if candidate.path == path:
                raise
            if ranks.rank == 0:
                log.warning("%s; the one before is tried", error)
        else:
            return candidate.about
    if found:
        raise CheckpointError(f"no checkpoint in '{path}' can be read{remedy}")
    if old := ranks.first(lambda: next(chain(path.glob("step_*.pt"), path.glob("checkpoints/step_*.pt")), None)):
        raise CheckpointError(f"'{old}' is a checkpoint of fastmum 0.1, which this one cannot read{remedy}")
    return None


def _read(about: About, state: State, ranks: Ranks) -> None:
    """Compare all files with the manifest, each rank some of them, then fill `state`."""
    share = sorted(about.files, key=lambda name: about.files[name].size)[ranks.rank :: ranks.size]

    def look() -> str | None:
        return next((found for name in share if (found := damage(about.path / name, about.files[name]))), None)

    try:
        for problem in filter(None, ranks.each(look)):
            raise CheckpointError(problem)
        read_parts(about.path, state, ranks)
    except CheckpointError as error:
        raise UnreadableError(f"checkpoint '{about.path}' cannot be read ({error})") from None


def _none(path: Path) -> CheckpointError:
    return CheckpointError(f"there is no checkpoint in '{path}'" if path.exists() else f"'{path}' does not exist")
