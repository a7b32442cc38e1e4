"""Every backend that can run on the device that is here, CUDA where there is one, against a float64 loop over spans."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from truth import ASKING, LENGTHS, Problem, gradients, looped, plain, problem, relative, true_gradients

from fastmum.attention import BACKENDS, dense_attention, ragged_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(p: Problem) -> Problem:
    return p._replace(**{name: getattr(p, name).to(DEVICE) for name in ("q", "k", "v", "grad")})


def assert_as_good_as_plain(ours: tuple[Tensor, ...], p: Problem) -> None:
    """In float32 within 1e-5 of the truth; in bfloat16 not much farther from it than torch's attention."""
    bound = 1e-5 if p.q.dtype == torch.float32 else None
    plainly, truth = gradients(looped(plain, p), p), true_gradients(p)
    for name, value, of_plain, true in zip(("out", "dq", "dk", "dv"), ours, plainly, truth, strict=True):
        assert value.device.type == DEVICE.type
        assert relative(value, true) <= (bound or 1.5 * relative(of_plain, true)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("asking", [LENGTHS, ASKING], ids=["all", "some"])
@pytest.mark.parametrize("name", BACKENDS)
def test_ragged(name: str, asking: dict[str, list[int]], lengths: str, dtype: torch.dtype) -> None:
    backend = BACKENDS[name]
    if reason := backend.why_not(DEVICE) or backend.why_not_dtype(dtype):
        pytest.skip(f"attention backend '{name}': {reason}")
    p = on_device(problem(LENGTHS[lengths], 2, 64, dtype, asking[lengths]))
    assert_as_good_as_plain(gradients(lambda q, k, v: ragged_attention(q, k, v, backend=name, **p.spans), p), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dense(dtype: torch.dtype) -> None:
    p = on_device(problem(LENGTHS["equal"], 2, 64, dtype))
    assert_as_good_as_plain(gradients(lambda q, k, v: dense_attention(q, k, v, LENGTHS["equal"][0]), p), p)
