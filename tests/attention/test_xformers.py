"""The xformers backend: its values and gradients by a stand-in of the package that computes."""

from __future__ import annotations

from collections.abc import Iterator

import packages
import pytest
import torch
from torch import Tensor
from truth import Problem, cumulated, gradients, problem, relative, true_gradients

from fastmum.attention import BACKENDS, Spans, xformers

QUERIES, KEYS = [3, 1, 5], [5, 1, 9]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """Masks of the stand-in must not outlive it."""
    xformers._mask_of_lengths.cache_clear()
    yield
    xformers._mask_of_lengths.cache_clear()


def by_xformers(p: Problem, padding: int = 0) -> tuple[Tensor, ...]:
    cu_q, cu_k = (cumulated(lengths + [0] * padding) for lengths in (p.queries, p.keys))
    backend = BACKENDS["xformers"]
    plan = backend.plan(Spans(cu_q, cu_k, max(p.queries), max(p.keys)), torch.device("cpu"))
    return gradients(lambda q, k, v: backend.attend(q, k, v, plan), p)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("lengths", [(KEYS, KEYS), (QUERIES, KEYS), ([1], [1]), ([4, 4], [4, 4])])
def test_xformers_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[list[int], list[int]], padding: int
) -> None:
    recorded = packages.install_xformers(monkeypatch)
    p = problem(lengths[1], 2, 16, queries=lengths[0])
    for value, true in zip(by_xformers(p, padding), true_gradients(p), strict=True):
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        assert relative(value, true) <= 1e-5
    calls = {name: function.calls for name, function in recorded.items()}
    assert all(len(of_function) == 1 for of_function in calls.values())
    masks = [call["attn_bias"] for (call,) in calls.values()]
    assert all(mask is masks[0] for mask in masks)  # made once a batch
    assert (masks[0].queries, masks[0].keys) == lengths
    assert "p" not in calls["memory_efficient_attention_forward"][0]
    assert "scale" not in calls["memory_efficient_attention_forward"][0]


def test_xformers_masks_of_other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    packages.install_xformers(monkeypatch)
    for keys in ([3, 4], [4, 3], [7], [1] * 7, [3, 4], [2, 5]):
        p = problem(keys, 2, 16)
        for value, true in zip(by_xformers(p), true_gradients(p), strict=True):
            assert relative(value, true) <= 1e-5


@pytest.mark.parametrize(("queries", "keys"), [([0, 3], [4, 5]), ([2, 3], [0, 5])])
def test_xformers_refuses_spans_on_one_side(
    monkeypatch: pytest.MonkeyPatch, queries: list[int], keys: list[int]
) -> None:
    packages.install_xformers(monkeypatch)
    with pytest.raises(ValueError, match=r"xformers needs keys for every span of queries .* use 'sdpa'"):
        by_xformers(problem(keys, 2, 16, queries=queries))
