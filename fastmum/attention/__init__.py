"""Attention over packed tokens: equal spans (the tokens of a frame) and ragged ones (the frames of a sequence).

Legend: T tokens of a batch, packed; n spans, one behind another; L tokens of a span; h heads; d width of a head.

`dense_attention` and `ragged_attention` are all that a caller needs. What computes the ragged one is a `Backend`, one a
file, chosen once by `choose_backend`; what it needs to know about the spans is a `Plan`, made once a batch.
"""

from fastmum.attention.backend import AttentionError, Backend, Plan
from fastmum.attention.choice import BACKENDS, choose_backend
from fastmum.attention.dense import dense_attention
from fastmum.attention.ragged import ragged_attention
from fastmum.attention.spans import Spans

__all__ = [
    "BACKENDS",
    "AttentionError",
    "Backend",
    "Plan",
    "Spans",
    "choose_backend",
    "dense_attention",
    "ragged_attention",
]
