"""`torch.distributed.checkpoint`: parts of tensors into files, and from files into any other parts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from fastmum.engine.checkpoint.about import State
from fastmum.engine.checkpoint.errors import CheckpointError, reason
from fastmum.engine.checkpoint.files import FileAbout, HashedFiles
from fastmum.engine.checkpoint.ranks import Ranks
from fastmum.kernels.halves import Halves

# One process without torch.distributed is what we ask for.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class _Planner(DefaultSavePlanner):
    """Places by the live tensors, of which it sees shapes and sharding alone; contents from the copies."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._parts[index.fqn]


def write_parts(path: Path, state: State, parts: Mapping[str, Tensor], ranks: Ranks) -> dict[str, FileAbout]:
    """Write the parts of all ranks and put them on disk; returns the files that this rank wrote.

    Args:
        path: an empty folder.
        state: the tensors that `parts` are this rank's parts of.

    Raises:
        CheckpointError: a rank could not; on all ranks alike.
    """
    files = HashedFiles()
    # Copying ahead would wait for the device at every tensor; ours are on the CPU already.
    writer = dcp.FileSystemWriter(path, per_thread_copy_ahead=0)
    writer.fs = files
    with _agreed(ranks), torch.no_grad():
        dcp.save(
            {name: copy if isinstance(state[name], Halves) else state[name] for name, copy in parts.items()},
            storage_writer=writer,
            planner=_Planner(parts),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    return files.written


def read_parts(path: Path, state: State, ranks: Ranks) -> None:
    """Fill the tensors of `state`, however they are sharded, from a checkpoint.

    Raises:
        CheckpointError: a rank could not; on all ranks alike.
    """
    whole = {name: _whole(tensor) for name, tensor in state.items()}
    with _agreed(ranks), torch.no_grad():
        dcp.load(
            whole,
            storage_reader=dcp.FileSystemReader(path),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
        for name, tensor in state.items():
            if isinstance(tensor, Halves):
                tensor.fill_(whole[name].to(tensor.parameter.device))


def _whole(tensor: Tensor | Halves) -> Tensor:
    """Where to read a tensor to: the memory of one in halves has no room for it as it is in the file."""
    if isinstance(tensor, Halves):
        return torch.empty_like(tensor.parameter, dtype=torch.float32, device="cpu")
    return tensor.detach()


@contextmanager
def _agreed(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # it has reached all ranks
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise CheckpointError(f"rank {rank}: {reason(cause)}" if ranks.size > 1 else reason(cause)) from error
