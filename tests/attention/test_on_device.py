"""Every backend that runs on the present device, CUDA if there is one, against a float64 loop over segments."""

from __future__ import annotations

import pytest
import torch
from truth import FLOATS, LENGTHS, Problem, assert_as_good_as_plain, gradients, problem

from fastmum.attention import BACKENDS, dense_attention, ragged_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(p: Problem) -> Problem:
    return p._replace(**{name: getattr(p, name).to(DEVICE) for name in ("q", "k", "v", "grad")})


@pytest.mark.parametrize("name", BACKENDS)
def test_ragged(name: str) -> None:
    if reason := BACKENDS[name].why_not(DEVICE):
        pytest.skip(f"attention backend '{name}': {reason}")
    for dtype in FLOATS:
        for queries, keys in LENGTHS.values() if BACKENDS[name].why_not_dtype(dtype) is None else ():
            p = on_device(problem(keys, 2, 64, dtype, queries))
            ours = gradients(lambda q, k, v, p=p: ragged_attention(q, k, v, backend=name, **p.segments), p)
            assert_as_good_as_plain(ours, p, factor=1.5, largest=3.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "bf16"])
def test_dense(dtype: torch.dtype) -> None:
    p = on_device(problem([65] * 4, 2, 64, dtype))
    assert_as_good_as_plain(gradients(lambda q, k, v: dense_attention(q, k, v, 65), p), p, factor=1.5, largest=3.0)
