"""Reading checkpoints: the newest intact one is verified, compared with the model, and loaded in place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmum.engine.checkpoint.manifest import (
    CheckpointError,
    CheckpointManifest,
    State,
    UnreadableError,
    find_checkpoints,
)
from fastmum.engine.checkpoint.shards import Group, Ranks, file_damage, read_shards

log = logging.getLogger(__name__)


class CheckpointWeights(NamedTuple):
    """Weights of a checkpoint: a state dict, float32 on the CPU."""

    manifest: CheckpointManifest
    tensors: dict[str, Tensor]


def load_newest(
    path: Path, state: State, model_config: Mapping[str, Any], group: Group = None
) -> CheckpointManifest | None:
    """Fill `state` in place from the newest intact checkpoint; None if there is no checkpoint.

    Args:
        path: a checkpoint, a folder of checkpoints, or a run.
        state: tensors of the saved names and global shapes, sharded in any way.
        model_config: compared with the saved one.

    Raises:
        CheckpointError: no checkpoint is intact, or the newest intact one holds another model or other tensors.
    """
    ranks = Ranks(group)

    def fill(manifest: CheckpointManifest) -> None:
        manifest.check_model(model_config)
        manifest.check_tensors(state)
        _read(manifest, state, ranks)

    return _newest(path, fill, ranks, remedy="; train.resume=never sets the run aside")


def load_checkpoint(
    path: Path, state: State, model_config: Mapping[str, Any], group: Group = None
) -> CheckpointManifest:
    """`load_newest`, but raises CheckpointError if there is no checkpoint."""
    return load_newest(path, state, model_config, group) or _raise_missing(path)


def read_weights(path: Path, prefix: str = "model.") -> CheckpointWeights:
    """Read the tensors named `prefix`* of the newest intact checkpoint, in this process only.

    Args:
        path: a checkpoint, a folder of checkpoints, or a run.
        prefix: removed from the names.

    Raises:
        CheckpointError: there is none.
    """
    tensors: dict[str, Tensor] = {}

    def read(manifest: CheckpointManifest) -> None:
        tensors.clear()
        for name, (shape, dtype) in manifest.tensors.items():
            if name.startswith(prefix):
                tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        _read(manifest, tensors, single)

    single = Ranks(None)
    manifest = _newest(path, read, single) or _raise_missing(path)
    return CheckpointWeights(manifest, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})


def _newest(
    path: Path, use: Callable[[CheckpointManifest], None], ranks: Ranks, remedy: str = ""
) -> CheckpointManifest | None:
    """The newest checkpoint for which `use` does not raise UnreadableError."""
    found = ranks.on_main(lambda: find_checkpoints(path))
    for candidate in found:
        try:
            if candidate.manifest is None:
                raise UnreadableError(candidate.problem)
            use(candidate.manifest)
        except UnreadableError as error:
            if candidate.path == path:
                raise
            if ranks.rank == 0:
                log.warning("%s; trying the one before", error)
        else:
            return candidate.manifest
    if found:
        raise CheckpointError(f"no checkpoint in '{path}' can be read{remedy}")
    if old := ranks.on_main(lambda: next(chain(path.glob("step_*.pt"), path.glob("checkpoints/step_*.pt")), None)):
        raise CheckpointError(f"'{old}' is a checkpoint of fastmum 0.1, which cannot be read{remedy}")
    return None


def _read(manifest: CheckpointManifest, state: State, ranks: Ranks) -> None:
    """Verify all files, each rank some of them, then fill `state`."""
    own = sorted(manifest.files, key=lambda name: manifest.files[name].size)[ranks.rank :: ranks.size]

    def verify() -> None:
        for name in own:
            if damage := file_damage(manifest.path / name, manifest.files[name]):
                raise CheckpointError(damage)

    try:
        ranks.on_all(verify)
        read_shards(manifest.path, state, ranks)
    except CheckpointError as error:
        raise UnreadableError(f"checkpoint '{manifest.path}' cannot be read ({error})") from None


def _raise_missing(path: Path) -> CheckpointManifest:
    raise CheckpointError(f"there is no checkpoint in '{path}'" if path.exists() else f"'{path}' does not exist")
