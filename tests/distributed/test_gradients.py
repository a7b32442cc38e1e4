"""Sums of gradients over batches against float64, for any sizes, layouts and buckets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastmum.engine import gradients
from fastmum.engine.distributed import DistContext
from fastmum.engine.gradients import Gradients
from fastmum.engine.task import ParamGroup

shapes = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(1, 40), st.integers(2, 4), st.data())
def test_sums_of_several_batches(sizes, bucket, batches, data):
    parameters = [nn.Parameter(torch.randn(*size, dtype=torch.float32).transpose(0, -1)) for size in sizes]
    used = [data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))) for _ in range(batches)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gradients.BUCKET, "cpu", bucket)
        ours = Gradients([ParamGroup(parameters)], DistContext(), batches)
    for _ in range(2):  # a step leaves nothing to the next
        truth = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
        for batch, some in enumerate(used):
            ours.next_batch(last=batch == batches - 1)
            factors = [torch.randn(p.shape) for p in parameters]
            parts = [(p * f).sum() for p, f, use in zip(parameters, factors, some, strict=True) if use]
            if parts:
                sum(parts).backward()
            for total, factor, use in zip(truth, factors, some, strict=True):
                total += use * factor.double()
        ours.finish()
        for p, total in zip(parameters, truth, strict=True):
            assert ours.of(p).stride() == p.stride()
            torch.testing.assert_close(ours.of(p).double(), total, rtol=1e-5, atol=1e-5)
        norm = torch.stack([total.square().sum() for total in truth]).sum().sqrt()
        torch.testing.assert_close(ours.norms()[0].double(), norm, rtol=1e-4, atol=1e-5)
        ours.clear()
    assert all(p.grad is None for p in parameters)


def test_bfloat16_gradients_are_summed_in_float32():
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    ours = Gradients([ParamGroup([p])], DistContext(), batches=3)
    for batch, value in enumerate((256.0, 1.0, 1.0)):  # in bfloat16 256 + 1 is 256
        ours.next_batch(last=batch == 2)
        (p * value).sum().backward()
    ours.finish()
    assert ours.of(p).tolist() == [258.0] * 4


def test_buckets_are_sent_during_the_backward_pass(monkeypatch):
    """Those of the last layers before the gradients of the first exist, in one order, once a step."""

    class Sent:
        def wait(self) -> None:
            pass

    layers = [nn.Linear(4, 4, bias=False) for _ in range(6)]
    sent, arrived = [], []
    monkeypatch.setitem(gradients.BUCKET, "cpu", 32)
    monkeypatch.setattr(gradients.dist, "all_reduce", lambda wire, async_op: sent.append(len(arrived)) or Sent())
    ours = Gradients([ParamGroup([layer.weight for layer in layers])], DistContext(size=2), batches=2)
    for layer in layers:
        layer.weight.register_post_accumulate_grad_hook(lambda p: arrived.append(p))
    x = torch.randn(3, 4)
    for last in (False, True):
        ours.next_batch(last)
        y = x
        for layer in layers:
            y = layer(y)
        y.sum().backward()
        assert len(sent) == 3 * last, "nothing is sent before the step's last batch"
    # A bucket holds two layers; ours is the first hook, so that of the second layer is not yet counted.
    assert sent == [7, 9, 11]
    ours.finish()
    assert len(sent) == 3


def test_the_gradient_of_a_single_batch_is_not_copied():
    parameters = [nn.Parameter(torch.randn(size)) for size in (3, 4)]
    ours = Gradients([ParamGroup(parameters)], DistContext())
    torch.cat(parameters).square().sum().backward()
    ours.finish()
    assert all(ours.of(p).data_ptr() == p.grad.data_ptr() for p in parameters)
    torch.testing.assert_close(ours.norms()[0], 2 * torch.cat(parameters).detach().norm())
    parameters[0].grad.fill_(torch.nan)
    assert not ours.norms()[0].isfinite()
