"""Products of bfloat16 computed in float32, on CPUs without bfloat16 instructions: the same numbers, rounded once."""

import pytest
import torch
from asserts import assert_close, check_frozen
from support import double, results

import fastmum.kernels.matmul as module
from fastmum.kernels.matmul import linear, widens

BF16 = torch.bfloat16


@pytest.fixture(params=[False, True], ids=["fast", "slow"])
def slow(request, monkeypatch) -> bool:
    """Whether the CPU is one that multiplies float32 only."""
    monkeypatch.setattr(module, "SLOW_BFLOAT16", request.param)
    return request.param


def test_who_widens(slow):
    assert widens(torch.zeros(1, dtype=BF16)) == slow
    assert not widens(torch.zeros(1))
    assert not widens(torch.zeros(1, dtype=BF16, device="meta"))


@pytest.mark.parametrize("autocast", [False, True])
def test_linear_and_its_results(slow, autocast):
    inputs = [torch.randn(3, 7, 33).to(BF16), torch.randn(19, 33).to(BF16), torch.randn(19).to(BF16)]
    weight = torch.randn(3, 7, 19).to(BF16)
    with torch.autocast("cpu", BF16, enabled=autocast):
        ours = results(linear, inputs, weight)
    truth = results(torch.nn.functional.linear, double(inputs), weight)
    plain = results(torch.nn.functional.linear, [x.float() for x in inputs], weight)
    for value, true, of_float in zip(ours, truth, plain, strict=True):
        assert value.dtype == BF16
        assert_close(value, true, of_float.to(BF16))


@pytest.mark.parametrize(("needed", "unsaved"), [((0,), (0,)), ((1,), (1,)), ((2,), (0, 1))])
def test_frozen_inputs(monkeypatch, needed, unsaved):
    monkeypatch.setattr(module, "SLOW_BFLOAT16", True)
    inputs = [torch.randn(*s).to(BF16) for s in ((4, 3), (2, 3), (2,))]
    operations = 2 * 4 * 3 * 2 * (needed != (2,))
    check_frozen(linear, inputs, [torch.randn(4, 2).to(BF16)], needed, unsaved, operations)
