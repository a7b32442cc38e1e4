"""Further backends for CUDA: the packages flash-attn, flash-attn-4 and xformers, and torch's FlexAttention."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastmum.attention.backend import HALF, Backend, Group, Segments, attention_operator
from fastmum.attention.varlen import Plan, attend_by

TILE = 128  # side of FlexAttention's tiles, its default


class FlashAttn2(Backend):
    """`flash_attn.flash_attn_varlen_func` of the `flash-attn` 2 package."""

    name = "flash_attn"
    dtypes = HALF
    package = "flash_attn.flash_attn_interface"
    install = "pip install 'fastmum[flash]' builds it from source, which needs nvcc"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Segments) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(q, k, v, *plan[:4], deterministic=deterministic)  # without `sizes`


class FlashAttn4(Backend):
    """The kernels of the `flash-attn-4` package; no backward pass below sm_90."""

    name = "flash_attn_4"
    dtypes = HALF
    package = "flash_attn.cute"
    install = "pip install 'fastmum[flash4]'"

    def why_not(self, device: torch.device) -> str | None:
        reason = super().why_not(device)
        major, minor = torch.cuda.get_device_capability(device) if reason is None else (9, 0)
        return reason if major >= 9 else f"it trains on sm_90 and later only, and this is sm_{major}{minor}"

    def plan(self, segments: Segments, device: torch.device) -> Plan:
        return Plan(segments.to(device), self.name)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        return attend_by(q, k, v, plan)


class Xformers(Backend):
    """`xformers.ops.memory_efficient_attention`; the backward pass recomputes the forward pass."""

    name = "xformers"
    package = "xformers"
    install = "pip install 'fastmum[xformers]'"

    def why_not(self, device: torch.device) -> str | None:
        if torch.are_deterministic_algorithms_enabled():
            return "its backward pass may add in any order, and train.deterministic is true"
        return super().why_not(device)

    def plan(self, segments: Segments, device: torch.device) -> Segments:
        return segments.to(torch.device("cpu"))  # the mask is made of lists of lengths

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Segments) -> Tensor:
        return xformers_attention(q, k, v, plan.cu_seqlens_q, plan.cu_seqlens_k)


def _forward(q: Tensor, k: Tensor, v: Tensor, groups: list[Group]) -> Tensor:
    from xformers import ops

    mask = _mask(groups, q, k)
    return ops.memory_efficient_attention_forward(q[None], k[None], v[None], attn_bias=mask)[0].contiguous()


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
    from xformers import ops

    inputs, mask = (q[None], k[None], v[None]), _mask(groups, q, k)
    # The shape of the log-sum-exp depends on the lengths, so it cannot be saved in a static graph.
    out, lse = ops.memory_efficient_attention_forward_requires_grad(*inputs, attn_bias=mask)
    dq, dk, dv = ops.memory_efficient_attention_backward(grad[None], out, lse, *inputs, attn_bias=mask)
    return dq[0].contiguous(), dk[0].contiguous(), dv[0].contiguous()


# An operator, since masks hold Python lists that differ between batches.
xformers_attention = attention_operator("xformers_attention", _forward, _backward)


def _mask(groups: list[Group], q: Tensor, k: Tensor) -> Any:
    queries = tuple(group.Lq for group in groups for _ in range(group.n))
    keys = tuple(group.Lk for group in groups for _ in range(group.n))
    if (sum(queries), sum(keys)) != (len(q), len(k)):  # the mask has no gaps
        raise ValueError("xformers needs queries and keys in every segment that has either; use 'sdpa'")
    return _mask_of_lengths(queries, keys, q.device)


@lru_cache(maxsize=4)  # a batch has two: all queries, and the masked ones of the last block
def _mask_of_lengths(queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(list(queries), list(keys), device=device)


class Flex(Backend):
    """`torch.nn.attention.flex_attention` with a document mask: a token attends to the tokens of its segment."""

    name = "flex"
    package = "torch.nn.attention.flex_attention"
    install = "it comes with torch 2.5 and later"

    def plan(self, segments: Segments, device: torch.device) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        document_q, document_k = (_documents(cu, device) for cu in (segments.cu_seqlens_q, segments.cu_seqlens_k))

        def same_document(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return document_q[q] == document_k[k]

        (first_q, last_q, whole_q), (first_k, last_k, whole_k) = (_tiles(x) for x in (document_q, document_k))
        touching = (first_q[:, None] <= last_k) & (first_k <= last_q[:, None])
        full = (first_q[:, None] == last_k) & (last_q[:, None] == first_k) & whole_q[:, None] & whole_k
        blocks, lengths = (*_indices(touching & ~full), *_indices(full)), (len(document_q), len(document_k))
        return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=TILE, mask_mod=same_document, seq_lengths=lengths)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Any) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, h, T, d)
        # Uncompiled FlexAttention holds the scores of all pairs of tokens.
        function: Any = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
        return function(q, k, v, block_mask=plan)[0].transpose(0, 1).contiguous()


def _documents(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """Segment number of every token, (T,)."""
    tokens = int(cu_seqlens[-1])
    cu_seqlens = cu_seqlens.to(device, non_blocking=True)
    return torch.searchsorted(cu_seqlens[1:], torch.arange(tokens, dtype=cu_seqlens.dtype, device=device), right=True)


def _tiles(document: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last segment of every tile of tokens, and whether the tile is complete."""
    start = torch.arange(0, len(document), TILE, device=document.device)
    last = (start + TILE).clamp(max=len(document)) - 1
    return document[start], document[last], last - start == TILE - 1


def _indices(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) bool -> number of true columns per row, and column numbers with the true ones first."""
    count = tiles.sum(-1, dtype=torch.int32)
    order = (~tiles).to(torch.int8).argsort(dim=-1, stable=True).int()
    return count[None, None], order[None, None]


@lru_cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
