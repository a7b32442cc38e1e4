"""Checkpoints of several processes: resharding, and errors that all ranks raise."""

import logging
import resource
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import SIZE, Pool
from states import CONFIG, VALUES, assert_same, full_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fastmum.engine.checkpoint import CheckpointError, Checkpoints, find_checkpoints, load_newest

TIMEOUT = 60  # seconds for a job
PLACEMENTS = {"fsdp2": [Shard(0)], "hsdp": [Replicate(), Shard(0)]}
LAYOUTS = [(1, "ddp"), (2, "ddp"), (2, "fsdp2"), (4, "fsdp2"), (4, "hsdp")]


def join(rank, store):
    """Connect a process of the pool; returns process groups and meshes by the number of ranks."""
    timeout = timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", store=dist.FileStore(store, SIZE), rank=rank, world_size=SIZE, timeout=timeout)
    ranks = {size: SimpleNamespace(group=dist.new_group(list(range(size))), meshes={}) for size in (1, 2, 4)}
    for size in (2, 4):  # every process takes part in making every mesh
        ranks[size].meshes["fsdp2"] = DeviceMesh("cpu", torch.arange(size))
        ranks[size].meshes["hsdp"] = DeviceMesh("cpu", torch.arange(size).view(2, size // 2))
    return ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Processes that communicate over gloo; jobs get what `join` returns."""
    pool = Pool(TIMEOUT, join, str(tmp_path_factory.mktemp("ranks") / "store"))
    yield pool
    pool.close()


def placed_state(ranks, strategy, seed):
    """`full_state`, with weights and moments sharded by a strategy other than "ddp"."""
    return {
        name: tensor
        if strategy == "ddp" or name.startswith(("optimizer.", "meter."))
        else distribute_tensor(tensor, ranks.meshes[strategy], PLACEMENTS[strategy])
        for name, tensor in full_state(seed).items()
    }


def save(ranks, folder, strategy, seed, step):
    writer = Checkpoints(folder, keep=3, group=ranks.group)
    writer.save(step, placed_state(ranks, strategy, seed), VALUES)
    writer.close()


def load(ranks, folder, strategy):
    """Load the newest checkpoint over other values; returns its step and the whole tensors."""
    state = placed_state(ranks, strategy, seed=99)
    before = dict(state)
    with pytest.raises(CheckpointError, match=r"depth 2 \(configured: 9\)"):
        load_newest(folder, state, {**CONFIG, "depth": 9}, ranks.group)
    manifest = load_newest(folder, state, CONFIG, ranks.group)
    assert all(state[name] is tensor for name, tensor in before.items())
    return manifest.step, {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_into_any_other(ranks, tmp_path, layout):
    size, strategy = layout
    ranks.run(size, save, tmp_path, strategy, 5, 12)
    sizes = [file.stat().st_size for file in tmp_path.glob("*/*.distcp")]
    assert len(sizes) == size
    assert max(sizes) < 2 * min(sizes)  # the ranks share the work
    for size, strategy in LAYOUTS:
        for step, state in ranks.run(size, load, tmp_path, strategy):
            assert step == 12
            assert_same(state, 5)


def write_with_a_full_disk_on_rank_1(ranks, folder, strategy):
    """Three checkpoints; rank 1 cannot write the second (RLIMIT_FSIZE)."""
    handler, records, outcomes = logging.Handler(), [], []
    handler.emit = records.append
    logging.getLogger("fastmum").addHandler(handler)
    writer = Checkpoints(folder, keep=3, group=ranks.group)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (1, 2, 3):
        if step == 2 and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        writer.save(step, placed_state(ranks, strategy, step), VALUES)
        writer.before_update()
        try:
            outcomes.append(writer.wait())
        except CheckpointError as error:
            outcomes.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    logging.getLogger("fastmum").removeHandler(handler)
    return outcomes, writer.failed, writer.newest.name, len(records)


@pytest.mark.parametrize("strategy", ["ddp", "hsdp"])
def test_one_rank_that_cannot_write_fails_on_all(ranks, tmp_path, strategy):
    seen = ranks.run(4, write_with_a_full_disk_on_rank_1, tmp_path, strategy)
    for rank, (outcomes, failed, newest, lines) in enumerate(seen):
        assert outcomes[0] is outcomes[2] is None
        assert "step_0000002'" in outcomes[1]
        assert "(rank 1: File too large)" in outcomes[1]
        assert (failed, newest, lines) == (1, "step_0000003", int(rank == 0))
    assert [found.manifest.step for found in find_checkpoints(tmp_path)] == [3, 1]
    assert not list(tmp_path.glob("*.partial"))


def test_all_ranks_fall_back_together(ranks, tmp_path):
    for step in (1, 2):
        ranks.run(4, save, tmp_path, "hsdp", step, step)
    damaged = next(tmp_path.glob("step_0000002/*.distcp"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    for step, state in ranks.run(4, load, tmp_path, "hsdp"):
        assert step == 1
        assert_same(state, 1)
