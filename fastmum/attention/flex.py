"""FlexAttention with a document mask: a token sees the tokens of its span."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmum.attention.backend import Backend
from fastmum.attention.spans import Spans

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # side of the tiles that FlexAttention skips or does not; its default


class Flex(Backend):
    """`torch.nn.attention.flex_attention`, compiled."""

    name = "flex"
    package = "torch.nn.attention.flex_attention"
    install = "it comes with torch 2.5 and later"

    def plan(self, spans: Spans, device: torch.device) -> BlockMask:
        return document_mask(*(_documents(cu, device) for cu in (spans.cu_q, spans.cu_k)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockMask) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, h, T, d)
        return _flex_attention(q)(q, k, v, block_mask=plan)[0].transpose(0, 1).contiguous()


def document_mask(document_q: Tensor, document_k: Tensor) -> BlockMask:
    """The mask of tokens of the same document, from ascending document numbers (T_q,) and (T_k,)."""
    from torch.nn.attention.flex_attention import BlockMask

    def same_document(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return document_q[q] == document_k[k]

    (first_q, last_q, whole_q), (first_k, last_k, whole_k) = (_tiles(x) for x in (document_q, document_k))
    touching = (first_q[:, None] <= last_k) & (first_k <= last_q[:, None])
    full = (first_q[:, None] == last_k) & (last_q[:, None] == first_k) & whole_q[:, None] & whole_k
    return BlockMask.from_kv_blocks(
        *_listed(touching & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=same_document,
        seq_lengths=(len(document_q), len(document_k)),
    )


def _documents(cu: Tensor, device: torch.device) -> Tensor:
    """Number of the span of every token, (T,)."""
    tokens = int(cu[-1])
    cu = cu.to(device, non_blocking=True)
    return torch.searchsorted(cu[1:], torch.arange(tokens, dtype=cu.dtype, device=device), right=True)


def _tiles(document: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last document of every tile of tokens, and whether the tile is complete."""
    start = torch.arange(0, len(document), BLOCK, device=document.device)
    last = (start + BLOCK).clamp(max=len(document)) - 1
    return document[start], document[last], last - start == BLOCK - 1


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of booleans -> how many are true in every row, and their columns before all others."""
    count = tiles.sum(-1, dtype=torch.int32)
    order = (~tiles).to(torch.int8).argsort(dim=-1, stable=True).int()
    return count[None, None], order[None, None]


def _flex_attention(q: Tensor) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Not compiled, it would hold the scores of all tokens with all tokens.
    return _compiled() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention


@lru_cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
