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
from itertools import pairwise
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


def flash_attn_4_forward(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
    window_size_right=None, return_lse=False,
) -> tuple[Tensor, Tensor | None]:
    """`flash_attn.cute.interface._flash_attn_fwd`; the log-sum-exp is None unless requested."""
    assert softmax_scale is None
    assert not causal
    out, lse = varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return out, lse if return_lse else None


def flash_attn_4_backward(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, deterministic=False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flash_attn.cute.interface._flash_attn_bwd`."""
    return varlen_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
# fmt: on


# Kernels for packed segments, in float64 ------------------------------------------------------------------------------


def spans(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    """Tokens of the queries and keys of each segment, none of them empty on both sides."""
    ends = [[slice(*pair) for pair in pairwise(cu.tolist())] for cu in (cu_q, cu_k)]
    return list(zip(*ends, strict=True))


def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (h, T_q); tokens outside of the segments are NaN."""
    assert (cu_q.dtype, cu_k.dtype, type(max_q), type(max_k)) == (torch.int32, torch.int32, int, int)
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan, dtype=torch.float32)
    for some_q, some_k in spans(cu_q, cu_k):
        assert some_q.stop - some_q.start <= max_q
        assert some_k.stop - some_k.start <= max_k
        S = torch.einsum("qhd,khd->hqk", q[some_q].double(), k[some_k].double()) / q.shape[-1] ** 0.5
        out[some_q] = torch.einsum("hqk,khd->qhd", S.softmax(-1), v[some_k].double()).to(q.dtype)
        lse[:, some_q] = S.logsumexp(-1).float()
    return out, lse


def varlen_backward(grad, q, k, v, out, lse, cu_q, cu_k) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the log-sum-exp of the forward pass."""
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for some_q, some_k in spans(cu_q, cu_k):
        g, o, q_, k_, v_ = (x.double() for x in (grad[some_q], out[some_q], q[some_q], k[some_k], v[some_k]))
        scale = q.shape[-1] ** -0.5
        P = (torch.einsum("qhd,khd->hqk", q_, k_) * scale - lse[:, some_q, None].double()).exp()
        dS = P * (torch.einsum("qhd,khd->hqk", g, v_) - (g * o).sum(-1).mT[..., None]) * scale
        parts = torch.einsum("hqk,khd->qhd", dS, k_), *(torch.einsum("hqk,qhd->khd", *x) for x in ((dS, q_), (P, g)))
        for whole, some, part in zip(grads, (some_q, some_k, some_k), parts, strict=True):
            whole[some] = part.to(whole.dtype)
    dq, dk, dv = grads
    return dq, dk, dv


class VarlenKernels:
    """The kernels of `fastmum.attention.varlen` on the CPU: torch's operators, and flash-attn-4.

    `calls` are the lengths of queries and of keys, and their bounds, of each forward pass; `names` the operators.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[int], list[int], int, int]] = []
        self.names: list[str] = []
        self.library = torch.library.Library("aten", "IMPL")
        for name in ("flash", "cudnn"):
            for which in ("forward", "backward"):
                function = getattr(self, f"{name}_{which}")
                self.library.impl(f"_{name}_attention_{which}", function, "CPU")
        for which in ("", "_backward"):
            function = getattr(self, f"efficient{which}")
            self.library.impl(f"_scaled_dot_product_efficient_attention{which}", function, "CPU")
        members = {"_flash_attn_fwd": self._recorded("flash_attn_4", flash_attn_4_forward)}
        install(monkeypatch, "flash_attn.cute.interface", **members, _flash_attn_bwd=flash_attn_4_backward)

    def note(self, name: str, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
        self.names.append(name)
        self.calls.append((cu_q.diff().tolist(), cu_k.diff().tolist(), max_q, max_k))

    def _recorded(self, name: str, function: Callable) -> Callable:
        def call(q, k, v, **names):
            self.note(name, *(names[x] for x in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")))
            return function(q, k, v, **names)

        return call

    def flash_forward(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, **rest):
        assert (dropout, causal, debug) == (0.0, False, False)
        self.note("flash", cu_q, cu_k, max_q, max_k)
        return *varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k), *(q.new_empty(0) for _ in range(3))

    def flash_backward(
        self, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, **rest
    ):  # fmt: skip
        assert (dropout, causal, rng.dtype, rng.shape) == (0.0, False, torch.uint64, (2,))
        return varlen_backward(grad, q, k, v, out, lse, cu_q, cu_k)

    def efficient(self, q, k, v, bias, with_lse, *rest, **more):
        """Groups of equal segments, (n, h, L, d)."""
        assert (bias, with_lse) == (None, True)
        self.names.append("efficient")
        S = q.double() @ k.double().mT / q.shape[-1] ** 0.5
        return (S.softmax(-1) @ v.double()).to(q.dtype), S.logsumexp(-1).float(), q.new_empty(0), q.new_empty(0)

    def efficient_backward(self, grad, q, k, v, bias, out, lse, seed, offset, dropout, mask, *rest, **more):
        assert (dropout, mask) == (0.0, [True, True, True, False])
        g, o, q_, k_, v_, scale = *(x.double() for x in (grad, out, q, k, v)), q.shape[-1] ** -0.5
        P = (q_ @ k_.mT * scale - lse[..., None].double()).exp()
        dS = P * (g @ v_.mT - (g * o).sum(-1, keepdim=True)) * scale
        return *(x.to(q.dtype) for x in (dS @ k_, dS.mT @ q_, P.mT @ g)), q.new_empty(0)

    def cudnn_forward(self, q, k, v, bias, cu_q, cu_k, max_q, max_k, with_lse, *rest, **more):
        assert (bias, with_lse) == (None, True)
        self.note("cudnn", cu_q, cu_k, max_q, max_k)
        out, lse = varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k)
        empty = q.new_empty(0)
        return out, lse.mT[..., None].contiguous(), cu_q, cu_k, max_q, max_k, empty, empty, empty

    def cudnn_backward(
        self, grad, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, **rest
    ):  # fmt: skip
        assert (bias is None or not bias.numel(), dropout, causal, lse.shape) == (True, 0.0, False, (*q.shape[:2], 1))
        return varlen_backward(grad, q, k, v, out, lse[..., 0].mT, cu_q, cu_k)


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
