"""Stand-ins for the attention packages, with the signatures of the real functions, so that wrong arguments fail.

Signatures of flash-attn 2.8.4, flash-attn-4 of the same repository, and xformers 0.0.35.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from types import ModuleType

import pytest
import torch
from torch import Tensor


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """Replace a module and its parents by stand-ins."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        part = ".".join(parts[:i])
        if not isinstance(sys.modules.get(part), StandIn):
            module = StandIn(part)
            module.__spec__ = importlib.machinery.ModuleSpec(part, None, is_package=True)
            monkeypatch.setitem(sys.modules, part, module)
            if i > 1:
                monkeypatch.setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module, raising=False)
    for member, value in members.items():
        monkeypatch.setattr(sys.modules[name], member, value, raising=False)


class StandIn(ModuleType):
    """A module without a file."""


class Recorded:
    """A function that records its arguments by name, and its results."""

    def __init__(self, like: Callable[..., object], result: Callable[..., object] | None = None) -> None:
        self.calls: list[dict[str, object]] = []
        self.results: list[object] = []
        self._like, self._result = like, result or like

    def __call__(self, *args: object, **kwargs: object) -> object:
        bound = signature(self._like).bind(*args, **kwargs)
        self.calls.append(dict(bound.arguments))
        bound.apply_defaults()
        self.results.append(self._result(*bound.args, **bound.kwargs))
        return self.results[-1]


# fmt: off
def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
) -> Tensor:
    """`flash_attn.flash_attn_varlen_func`, version 2."""
    return torch.empty_like(q)


def flash_attn_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
) -> tuple[Tensor, None]:
    """`flash_attn.cute.flash_attn_varlen_func`; the log-sum-exp is None unless requested."""
    return torch.empty_like(q), None
# fmt: on


# xformers, computing with plain products -----------------------------------------------------------------------------


@dataclass
class BlockDiagonalMask:
    """`xformers.ops.fmha.attn_bias.BlockDiagonalMask`."""

    queries: list[int]
    keys: list[int]
    device: torch.device

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None) -> BlockDiagonalMask:
        assert isinstance(q_seqlen, list)
        assert isinstance(kv_seqlen, list)
        return cls(q_seqlen, kv_seqlen, device)

    def allowed(self) -> Tensor:
        """(T_q, T_k), true within blocks."""
        return torch.block_diag(*(torch.ones(q, k) for q, k in zip(self.queries, self.keys, strict=True))).bool()


def _scores(query: Tensor, key: Tensor, mask: BlockDiagonalMask, *others: Tensor) -> Tensor:
    """(1, h, T_q, T_k), with the checks of xformers: one batch of (tokens, heads, width) of the mask's lengths."""
    assert isinstance(mask, BlockDiagonalMask)
    assert (query.shape[:2], key.shape[:2]) == ((1, sum(mask.queries)), (1, sum(mask.keys)))
    assert all((x.ndim, x.dtype, x.device) == (4, query.dtype, mask.device) for x in (query, key, *others))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask.allowed(), -torch.inf)


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
) -> tuple[Tensor, Tensor]:
    """`xformers.ops.memory_efficient_attention_forward_requires_grad` -> out, log-sum-exp (1, h, T_q)."""
    scores = _scores(query, key, attn_bias, value)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value), scores.logsumexp(-1)


@wraps(memory_efficient_attention_forward_requires_grad)
def memory_efficient_attention_forward(*args, **kwargs) -> Tensor:
    """`xformers.ops.memory_efficient_attention_forward`, of the same signature."""
    return memory_efficient_attention_forward_requires_grad(*args, **kwargs)[0]


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
) -> tuple[Tensor, Tensor, Tensor]:
    """`xformers.ops.memory_efficient_attention_backward`, from the log-sum-exp as the real one."""
    P = (_scores(query, key, attn_bias, value, grad, output) - lse[..., None]).exp()
    dP = torch.einsum("bqhd,bkhd->bhqk", grad, value)
    dS = P * (dP - (grad * output).sum(-1).mT[..., None]) / query.shape[-1] ** 0.5
    dk, dv = (torch.einsum("bhqk,bqhd->bkhd", *x) for x in ((dS, query), (P, grad)))
    return torch.einsum("bhqk,bkhd->bqhd", dS, key), dk, dv


def install_xformers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorded]:
    """All that fastmum calls of xformers; the calls of each by name."""
    prefix = "memory_efficient_attention_"
    names = [prefix + name for name in ("forward", "forward_requires_grad", "backward")]
    recorded = {name: Recorded(globals()[name]) for name in names}
    install(monkeypatch, "xformers.ops", **recorded)
    install(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    return recorded
