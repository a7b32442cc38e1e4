"""One operator around the fused kernels for packed segments, which the compiler does not trace.

The kernels want the number of segments and the longest lengths as Python numbers. The operator reads them from a small
tensor on the CPU: exact values in every batch, static shapes outside, no synchronisation and no recompilation.

Legend: T tokens, h heads, d width of a head, n segments.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.attention.backend import Segments
from fastmum.errors import first_line

log = logging.getLogger(__name__)
# Queries and keys of the segments of `agrees`: all tokens, and some of them as in the last block.
CHECKED = (([1, 257, 65, 700, 130], [1, 257, 65, 700, 130]), ([1, 192, 48, 525, 97], [1, 257, 65, 700, 130]))
CUDNN_QUERIES = 128  # cuDNN computes segments with more only
TOLERANCE = 0.02  # of the relative distance; bfloat16 rounds to 0.004


class Kernel(NamedTuple):
    """Forward and backward pass of segments (cu_seqlens_q, cu_seqlens_k, max_q, max_k)."""

    forward: Callable[..., tuple[Tensor, Tensor]]  # (q, k, v, *segments) -> out (T_q, h, d), log-sum-exp (h, T_q)
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]  # (grad, q, k, v, out, lse, *segments) -> dq, dk, dv


def _flash(q: Tensor, k: Tensor, v: Tensor, *segments: Any) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *segments, 0.0, False, False)
    return out, lse


def _flash_backward(grad: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
    # The random state is read where there is dropout only.
    rng, unused = (torch.empty(size, dtype=torch.uint64, device=grad.device) for size in (2, 0))
    return torch.ops.aten._flash_attention_backward(grad, *saved, 0.0, False, rng, unused)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, *segments: Any) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._cudnn_attention_forward(q, k, v, None, *segments, True)
    return out, lse.reshape(q.shape[1], len(q))  # in memory it is (T, h, 1)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *segments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.empty(2, dtype=torch.uint64, device=grad.device)
    saved = q, k, v, out, lse.view(len(q), q.shape[1], 1), rng, rng, None
    return torch.ops.aten._cudnn_attention_backward(grad, *saved, *segments, 0.0, False)


def _flash_4(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    names = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
    out, lse, *_ = _flash_attn_fwd(q, k, v, **names, return_lse=True)
    return out, lse


def _flash_4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, *_: int
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    deterministic = torch.are_deterministic_algorithms_enabled()
    names = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "deterministic": deterministic}
    return _flash_attn_bwd(q, k, v, out, grad, lse, **names)


# FA2, FA3 and FA4 are one operator of torch, which runs the version that is active (`flash.activate`).
KERNELS = {
    **dict.fromkeys(("FA2", "FA3", "FA4"), Kernel(_flash, _flash_backward)),
    "cuDNN": Kernel(_cudnn, _cudnn_backward),
    "flash_attn_4": Kernel(_flash_4, _flash_4_backward),
}


class Plan(NamedTuple):
    """Segments of a batch on the device, and the key of `KERNELS` that computes them."""

    segments: Segments
    kernel: str


def attend_by(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Attention of queries (T_q, h, d) to the keys and values (T_k, h, d) of their segment -> (T_q, h, d)."""
    cu_q, cu_k, max_q, max_k, sizes = plan.segments
    return varlen_attention(q, k, v, cu_q, cu_k, sizes, max_q, max_k, plan.kernel)[0]


@torch.library.custom_op("fastmum::varlen_attention", mutates_args=())
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sizes: Tensor | None, max_q: int, max_k: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention by a kernel of `KERNELS` -> out (T_q, h, d) and log-sum-exp (h, T_q) float32.

    `sizes` as in `Segments`; without it all segments are computed, with the bounds of their lengths.
    """
    segments = _exact(cu_q, cu_k, sizes, max_q, max_k)
    if segments is None:
        return q.new_zeros(q.shape), q.new_zeros((q.shape[1], len(q)), dtype=torch.float32)
    out, lse = _kernel(kernel, segments).forward(*map(_unit_stride, (q, k, v)), *segments)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("fastmum::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sizes: Tensor | None, out: Tensor,
    lse: Tensor, max_q: int, max_k: int, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous."""
    segments = _exact(cu_q, cu_k, sizes, max_q, max_k)
    if segments is None:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    grads = _kernel(kernel, segments).backward(*map(_unit_stride, (grad, q, k, v)), out, lse, *segments)
    dq, dk, dv = (x.contiguous() for x in grads)
    return dq, dk, dv


def _exact(
    cu_q: Tensor, cu_k: Tensor, sizes: Tensor | None, max_q: int, max_k: int
) -> tuple[Tensor, Tensor, int, int] | None:
    """The segments that are not empty with their longest lengths; None if there is no pair of tokens."""
    n = len(cu_q) - 1
    if sizes is not None:
        n, max_q, max_k = sizes.tolist()
    return (cu_q[: n + 1], cu_k[: n + 1], max_q, max_k) if n and max_q and max_k else None


def _kernel(name: str, segments: tuple[Tensor, Tensor, int, int]) -> Kernel:
    return KERNELS["FA2" if name == "cuDNN" and segments[2] <= CUDNN_QUERIES else name]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@varlen_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], len(q)), dtype=torch.float32)


varlen_attention_backward.register_fake(lambda grad, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:3]))


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.constants = inputs[6:]
    ctx.set_materialize_grads(False)  # nothing depends on the log-sum-exp


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *varlen_attention_backward(grad, *ctx.saved_tensors, *ctx.constants), *[None] * 6


varlen_attention.register_autograd(_differentiate, setup_context=_setup)


def sample(
    segments: Segments, device: torch.device, dtype: torch.dtype, heads: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normal queries, keys, values and output gradient of segments on the CPU, (T, heads, width) on `device`."""
    generator = torch.Generator().manual_seed(0)
    cu_q, cu_k, *_ = segments
    ends = [int(cu[-1]) for cu in (cu_q, cu_k, cu_k, cu_q)]
    q, k, v, grad = (torch.randn(T, heads, width, generator=generator).to(device, dtype) for T in ends)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def agrees(kernel: str, device: torch.device, dtype: torch.dtype, heads: int, width: int) -> bool:
    """Whether a kernel's output and gradients on five ragged segments are those of torch's attention in float32.

    A difference of more than `TOLERANCE`, or an error, is logged as a warning.
    """
    for queries, keys in CHECKED:
        cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys))
        segments = Segments(cu_q, cu_k, max(queries), max(keys), torch.tensor([len(keys), max(queries), max(keys)]))
        q, k, v, grad = sample(segments, device, dtype, heads, width)
        qkv = q, k, v
        try:
            out = attend_by(q, k, v, Plan(segments.to(device), kernel))
            ours = [out, *torch.autograd.grad(out, qkv, grad)]
        except (RuntimeError, ImportError, TypeError) as error:
            log.warning("%s attention is not used: it fails (%s)", kernel, first_line(error))
            return False
        wide = [x.detach().float().requires_grad_() for x in qkv]
        parts = (x.transpose(0, 1).split(n, 1) for x, n in zip(wide, (queries, keys, keys), strict=True))
        out = torch.cat([F.scaled_dot_product_attention(*x) for x in zip(*parts, strict=True)], 1).transpose(0, 1)
        truth = [out, *torch.autograd.grad(out, wide, grad.float())]
        pairs = ((x.detach().float(), y.detach()) for x, y in zip(ours, truth, strict=True))
        distances = torch.stack([(x - y).norm() / y.norm() for x, y in pairs])
        if not bool((distances <= TOLERANCE).all()):  # NaN is not
            log.warning(
                "%s attention is not used: it differs from torch's by %s, relatively", kernel, distances.tolist()
            )
            return False
    return True
