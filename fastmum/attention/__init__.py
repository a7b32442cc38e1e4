"""Attention within segments of packed tokens: equal segments (frames) and ragged ones (sequences of frames).

`dense_attention` and `ragged_attention` are the public functions. A `Backend`, chosen once by `choose_backend`,
computes ragged attention from a plan that it makes of the batch's `Segments`.
"""

from itertools import pairwise

import torch
from torch import Tensor

from fastmum.attention.backend import HALF, AttentionError, Backend, Segments, constant_in_graphs
from fastmum.attention.cuda import FlashAttn2, FlashAttn4, Flex, Xformers
from fastmum.attention.flash import Flash
from fastmum.attention.sdpa import Sdpa, dense_attention
from fastmum.kernels.checks import check_tensors

__all__ = [
    "BACKENDS", "AttentionError", "Backend", "Segments", "choose_backend", "dense_attention", "ragged_attention",
]  # fmt: skip

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Flash(), FlashAttn2(), FlashAttn4(), Xformers(), Sdpa(), Flex())
}


def choose_backend(
    name: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Backend:
    """Look up a backend of `BACKENDS`; "auto" is `flash` on CUDA in bfloat16 and float16, otherwise `sdpa`.

    AttentionError with the reason and the remedy if it is unknown or cannot compute tensors of `dtype` on `device`.
    """
    return BACKENDS[_usable(name, str(device), str(dtype).removeprefix("torch."))]


@constant_in_graphs  # the compiler does not trace the search for packages; constants must be strings
def _usable(name: str, device_name: str, dtype_name: str) -> str:
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    if name == "auto":
        name = "flash" if device.type == "cuda" and dtype in HALF else "sdpa"
    if name not in BACKENDS:
        raise AttentionError(f"attention backend '{name}' is unknown; one of auto, {', '.join(BACKENDS)} is allowed")
    reason = BACKENDS[name].why_not(device) or BACKENDS[name].why_not_dtype(dtype)
    if reason is not None:
        raise AttentionError(f"attention backend '{name}' cannot be used: {reason}; 'auto' selects one that can")
    return name


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str = "auto", *,
    cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention within consecutive segments of different lengths; differentiable in q, k and v.

    Returns (T_q, h, d), contiguous, in the dtype of q. Errors are those of `choose_backend`, and a TypeError or
    ValueError for an invalid argument, which it names.

    Args:
        q, k, v: (T, h, d) of one floating-point dtype, any strides.
        cu_seqlens: (n + 1,) int32 or int64 cumulative lengths, 0, L_0, L_0 + L_1, ..., T, on the device of q or on the
            CPU, where `sdpa`, `xformers` and `flex` read it. Segments may be empty.
        max_seqlen: upper bound of the lengths.
        backend: "auto" or a key of `BACKENDS`.
        cu_seqlens_q, max_seqlen_q: the same of the queries, if q has another number of tokens, (T_q, h, d).
    """
    cu_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    segments = Segments(cu_q, cu_seqlens, max_seqlen if max_seqlen_q is None else max_seqlen_q, max_seqlen)
    _check(q, k, v, segments)
    chosen = choose_backend(backend, q.device, q.dtype)
    return chosen.attend(q, k, v, chosen.plan(segments, q.device))


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
    cu_q, cu_k, max_q, max_k, _ = segments
    check_tensors(q=q, k=k, v=v)
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.ndim != 3 or x.shape[1:] != q.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but q, k and v must be (T, heads, width) alike")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, but q, k and v must be of one floating-point dtype")
    if len(k) != len(v):
        raise ValueError(f"k has {len(k)} tokens and v {len(v)}, but each key has a value")
    for suffix, cu, bound, tokens in (("", cu_k, max_k, len(k)), ("_q", cu_q, max_q, len(q))):
        name = f"cu_seqlens{suffix}"
        if not isinstance(cu, Tensor):
            raise TypeError(f"{name} is a {type(cu).__name__}, but must be a tensor")
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {cu.dtype}, but must be int32 or int64")
        if cu.ndim != 1 or len(cu) != len(cu_k) or len(cu) < 2:
            raise ValueError(f"{name} has shape {tuple(cu.shape)}, but must be (n + 1,) for n segments, n at least 1")
        # Values on a GPU would need a synchronisation; compiled code does not see them.
        if cu.device.type == "cpu" and not torch.compiler.is_compiling():
            ends = cu.tolist()
            if ends[0] != 0 or ends[-1] != tokens or ends != sorted(ends):
                raise ValueError(f"{name} must rise from 0 to the number of tokens, {tokens}, but is {ends}")
            if (longest := max(b - a for a, b in pairwise(ends))) > bound:
                raise ValueError(f"{name} has a segment of {longest} tokens, but max_seqlen{suffix} is {bound}")
