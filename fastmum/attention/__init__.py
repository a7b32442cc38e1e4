"""Attention within segments of packed tokens: equal segments (frames) and ragged ones (sequences of frames).

`dense_attention` and `ragged_attention` are the public functions. A `Backend`, chosen once by `choose_backend`,
computes ragged attention from a plan that it makes of the batch's `Segments`.
"""

from fastmum.attention.backend import AttentionError, Backend, Segments
from fastmum.attention.ragged import BACKENDS, choose_backend, ragged_attention
from fastmum.attention.sdpa import dense_attention

__all__ = [
    "BACKENDS",
    "AttentionError",
    "Backend",
    "Segments",
    "choose_backend",
    "dense_attention",
    "ragged_attention",
]
