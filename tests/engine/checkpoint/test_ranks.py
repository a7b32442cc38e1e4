"""Checkpoints of several processes: resharding, and errors that all ranks raise."""

import logging
import resource

import pytest
import torch.distributed as dist
from states import VALUES, assert_same, load, placed_state, save

from fastmum.engine.checkpoint import CheckpointError, Checkpoints, find_checkpoints

LAYOUTS = [(1, "ddp"), (2, "ddp"), (2, "fsdp2"), (4, "fsdp2"), (4, "hsdp")]


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
