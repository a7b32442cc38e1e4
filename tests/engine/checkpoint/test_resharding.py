"""A checkpoint of any number of processes, sharded in any way, goes on in any other."""

import pytest
import torch
from states import full_state, load, save

WAYS = [(1, "ddp"), (2, "ddp"), (2, "fsdp2"), (4, "fsdp2"), (4, "hsdp")]


@pytest.mark.parametrize("before", WAYS)
def test_any_way_into_any_other(team, tmp_path, before):
    size, strategy = before
    team.run(size, save, tmp_path, strategy, 5, 12)
    sizes = [file.stat().st_size for file in tmp_path.glob("*/*.distcp")]
    assert len(sizes) == size
    assert max(sizes) < 2 * min(sizes)  # the ranks share the work
    for size, strategy in WAYS:
        for step, state in team.run(size, load, tmp_path, strategy):
            assert step == 12
            torch.testing.assert_close(state, full_state(5), rtol=0, atol=0)
