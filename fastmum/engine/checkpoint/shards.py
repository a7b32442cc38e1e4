"""Shards of a state written and read by `torch.distributed.checkpoint` (DCP), and the loading of whole checkpoints.

Files are hashed while they are written. The newest intact checkpoint is verified, compared with the model, and loaded
in place.
"""

import contextlib
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from fastmum.engine.checkpoint.manifest import (
    MANIFEST,
    METADATA,
    CheckpointError,
    CheckpointManifest,
    FileHash,
    State,
    UnreadableError,
    find_checkpoints,
    reason,
)
from fastmum.files import unpickle
from fastmum.kernels.adamw import Halves

log = logging.getLogger(__name__)

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # in a run of one process

# What `.metadata` is made of. Paths are of any platform, and not used.
_PARTS = (
    torch.Size, metadata.Metadata, metadata.TensorStorageMetadata, metadata.TensorProperties,
    metadata.ChunkStorageMetadata, metadata.MetadataIndex, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo, torch.serialization._get_layout,
)  # fmt: skip
ALLOWED = {
    **{f"{part.__module__}.{part.__qualname__}": part for part in _PARTS},
    **{f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
    **{f"pathlib{m}.{kind}Path": PurePath for m in ("", "._local") for kind in ("Posix", "Windows", "PurePosix")},
}

T = TypeVar("T")
Group = dist.ProcessGroup | None  # gloo group of all ranks; None: a single process


class Ranks:
    """Calls functions on the ranks of a group; if one raises, all raise CheckpointError."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1

    def on_all(self, compute: Callable[[], T]) -> list[T]:
        """Call `compute` on every rank; all-gather its results."""
        outcomes: list[Any] = [_attempt(compute)]
        if self.group:
            own, outcomes = outcomes[0], [None] * self.size
            dist.all_gather_object(outcomes, own, group=self.group)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, CheckpointError):
                raise CheckpointError(f"rank {rank}: {outcome}" if self.size > 1 else str(outcome))
        return outcomes

    def on_main(self, compute: Callable[[], T]) -> T:
        """Call `compute` on rank 0; broadcast its result."""
        outcome: list[Any] = [_attempt(compute) if self.rank == 0 else None]
        if self.group:
            dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if isinstance(outcome[0], CheckpointError):
            raise outcome[0]
        return outcome[0]


def _attempt(compute: Callable[[], T]) -> T | CheckpointError:
    try:
        return compute()
    except Exception as error:  # the other ranks wait for an outcome
        return CheckpointError(reason(error))


class _HashedFileSystem(filesystem.FileSystem):
    """DCP's file system; `written` holds the hashes of the files, which are fsynced by DCP."""

    def __init__(self) -> None:
        self.written: dict[str, FileHash] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with _HashedFile(path) as file:
            yield file
        self.written[Path(path).name] = FileHash(file.size, file.hash.hexdigest())
        sync_folder(Path(path).parent)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _HashedFile(io.BufferedWriter):
    """Hashes what it writes. Defers write errors to flush(), because torch.save would mask the OSError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.hash, self.size = xxhash.xxh3_128(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.hash.update(data)
        self.size += size
        try:
            if self.error is None:
                super().write(data)
        except OSError as error:
            self.error = error
        return size

    def flush(self) -> None:
        if self.error:
            raise self.error
        super().flush()


class _Planner(DefaultSavePlanner):
    """Plans from the live tensors' metadata, writes the staged copies."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies = copies

    def lookup_object(self, index: metadata.MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


def write_shards(path: Path, state: State, copies: Mapping[str, Tensor], ranks: Ranks) -> dict[str, FileHash]:
    """Write the shards of all ranks into a folder, made if missing; returns the files of this rank.

    Of the live `state` only the metadata is used; `copies` are on the CPU, the shards that this rank writes.
    """
    files = _HashedFileSystem()
    # Copying ahead would synchronise with the device at every tensor; the copies are on the CPU.
    writer = dcp.FileSystemWriter(path, per_thread_copy_ahead=0)
    writer.fs = files
    with _raise_checkpoint_error(ranks), torch.no_grad():
        dcp.save(
            {name: copy if isinstance(state[name], Halves) else state[name] for name, copy in copies.items()},
            storage_writer=writer, planner=_Planner(copies), process_group=ranks.group, no_dist=ranks.group is None,
        )  # fmt: skip
    return files.written


class _Reader(dcp.FileSystemReader):
    """Reads `.metadata` without running its code; the shards must be among `files`."""

    def __init__(self, path: Path, files: Collection[str]) -> None:
        super().__init__(path)
        self._files = files

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with self.fs.create_stream(self.fs.concat_path(self.path, METADATA), "rb") as stream:
            found = unpickle(stream, ALLOWED)
        if not {shard.relative_path for shard in found.storage_data.values()} <= {*self._files}:
            raise CheckpointError(f"{METADATA} names files that {MANIFEST} does not list")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


def read_shards(path: Path, state: State, ranks: Ranks, files: Collection[str]) -> None:
    """Fill the tensors of `state`, sharded in any way, from the `files` of a checkpoint."""
    halves = {name: tensor for name, tensor in state.items() if isinstance(tensor, Halves)}
    whole = {n: torch.empty_like(h.parameter, dtype=torch.float32, device="cpu") for n, h in halves.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _raise_checkpoint_error(ranks), torch.no_grad():
        dcp.load(
            whole | {name: tensor.detach() for name, tensor in state.items() if not isinstance(tensor, Halves)},
            storage_reader=_Reader(path, files), planner=planner, process_group=ranks.group,
            no_dist=ranks.group is None,
        )  # fmt: skip
        for name, tensor in halves.items():
            tensor.fill_(whole[name].to(tensor.parameter.device))


@contextlib.contextmanager
def _raise_checkpoint_error(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # DCP raises it on all ranks
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise CheckpointError(f"rank {rank}: {reason(cause)}" if ranks.size > 1 else reason(cause)) from error


def file_damage(path: Path, expected: FileHash) -> str | None:
    """How a file differs from its hash, None if it is intact."""
    try:
        if wrong := expected.missing(path):
            return wrong
        with open(path, "rb", buffering=0) as file:
            xxh3 = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None if xxh3 == expected.xxh3 else f"{path.name} does not match its hash"


def sync_folder(path: Path) -> None:
    """Fsync the directory entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointWeights(NamedTuple):
    """Weights of a checkpoint: a state dict, float32 on the CPU."""

    manifest: CheckpointManifest
    tensors: dict[str, Tensor]


def load_newest(path: Path, state: State, sizes: Mapping[str, Any], group: Group = None) -> CheckpointManifest | None:
    """Fill `state` in place from the newest intact checkpoint; None if there is no checkpoint.

    `path` is a checkpoint, a folder of checkpoints, or a run; `state` has tensors of the saved names and global shapes,
    sharded in any way; `sizes` are the model's. CheckpointError: none is intact, or the newest intact one does not fit.
    """
    ranks = Ranks(group)

    def fill(manifest: CheckpointManifest) -> None:
        manifest.check_model(sizes)
        manifest.check_tensors(state)
        _read(manifest, state, ranks)

    return _newest(path, fill, ranks, remedy="; train.resume=never sets the run aside")


def load_checkpoint(path: Path, state: State, sizes: Mapping[str, Any], group: Group = None) -> CheckpointManifest:
    """`load_newest`, but raises CheckpointError if there is no checkpoint."""
    return load_newest(path, state, sizes, group) or _raise_missing(path)


def read_weights(path: Path, prefix: str = "model.") -> CheckpointWeights:
    """Read the tensors named `prefix`* of the newest intact checkpoint, in this process; the prefix is removed.

    `path` is a checkpoint, a folder of checkpoints, or a run; CheckpointError if there is none.
    """
    tensors: dict[str, Tensor] = {}

    def read(manifest: CheckpointManifest) -> None:
        if wrong := manifest.missing():  # before memory is allocated
            raise UnreadableError(f"checkpoint '{manifest.path}' cannot be read ({wrong})")
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

    def verify() -> None:
        for name, file in sorted(manifest.files.items(), key=lambda item: item[1].size)[ranks.rank :: ranks.size]:
            if damage := file_damage(manifest.path / name, file):
                raise CheckpointError(damage)

    try:
        ranks.on_all(verify)
        read_shards(manifest.path, state, ranks, manifest.files)
    except CheckpointError as error:
        raise UnreadableError(f"checkpoint '{manifest.path}' cannot be read ({error})") from None


def _raise_missing(path: Path) -> CheckpointManifest:
    raise CheckpointError(f"there is no checkpoint in '{path}'" if path.exists() else f"'{path}' does not exist")
