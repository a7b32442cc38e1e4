"""Rotary positions of q and k in a packed projection.

Legend: T tokens, D width, h heads, d = D / h width of a head, N positions of the table. Channel c of a head is rotated
with channel c + d/2. The heads of v follow those of q and k.

Fuses the lookup of sines and cosines, stored once per position, with the rotation. In place, v is not touched.
"""

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from fastmum.kernels.checks import INTEGERS, check_floating, check_range, check_tensors
from fastmum.kernels.dispatch import ceil_div, empty, jit, launch, power_of_2, tile_bytes, tl, use_triton
from fastmum.kernels.plans import operator, planned

SPECIAL = ("keep", "zero")
PARTS = ("qkv", "kv", "q")
CHUNK_BYTES = 1 << 20  # bytes of qkv that the CPU rotates at once: temporaries stay in the cache


def rope_qk(
    qkv: Tensor, positions: Tensor, sin: Tensor, cos: Tensor, num_heads: int, special: str = "keep",
    inplace: bool = False, parts: str = "qkv",
) -> Tensor:  # fmt: skip
    """Rotate q and k of a packed projection by the position of their token.

    Returns a tensor like `qkv`; the rotation is in float32 at least. Only `qkv` gets a gradient. TypeError or
    ValueError: a dtype, shape, device, `special` or `parts` that is not allowed. IndexError: positions out of range, on
    the CPU; a GPU, which would have to synchronise, gives NaN.

    Args:
        qkv: (T, 3*D) floating point: q, k and v of each token, (h, d) each; or those in `parts`.
        positions: (T,) int64 or int32, row of the tables; -1 for a token without a position (CLS).
        sin, cos: (N, d) tables of two equal halves (see `fastmum.model.block`), or one half, (N, d / 2).
        num_heads: h.
        special: q and k of tokens without a position: "keep" them, or set them to "zero" (the released model's
            treatment of CLS in global blocks).
        inplace: overwrite `qkv` and return it. Autograd permits it if `qkv` is neither a leaf that requires a gradient
            nor needed by the backward pass of its producer; a linear layer's output is neither.
        parts: contents of `qkv`: "qkv"; "kv", (T, 2*D); or "q", (T, D).
    """
    check_floating("qkv", qkv, 2, f"(T, {len(parts)} * D)")
    check_tensors(qkv=qkv, positions=positions)
    sin, cos = check_rotation(*qkv.shape, positions, sin, cos, num_heads, special, parts)
    rotated = num_heads * len(parts.removesuffix("v"))
    if inplace:
        if qkv.stride(1) != 1:
            raise ValueError(f"qkv has strides {qkv.stride()}, but in place its rows must be contiguous")
        if torch.is_grad_enabled() and qkv.requires_grad:
            return _RotateInPlace.apply(qkv, positions, sin, cos, rotated, special == "zero")
        # The compiler rejects an autograd function with mark_dirty where no gradient is recorded.
        _rope_qk_(qkv, positions, sin, cos, rotated, special == "zero", False)
        return qkv
    return _rope_qk(qkv, positions, sin, cos, rotated, special == "zero", False)


def check_rotation(
    T: int, width: int, positions: Tensor, sin: Tensor, cos: Tensor, num_heads: int, special: str, parts: str
) -> tuple[Tensor, Tensor]:
    """Check the arguments of a rotation of a (T, width) tensor; returns the first half of each table, (N, d / 2)."""
    check_tensors(positions=positions, sin=sin, cos=cos)
    if parts not in PARTS:
        raise ValueError(f"parts is {parts!r}, but must be one of {', '.join(PARTS)}")
    if num_heads < 1 or width % (2 * len(parts) * num_heads):
        raise ValueError(f"qkv is {width} wide, but must be {len(parts)} x {num_heads} heads x an even head width")
    if positions.dtype not in INTEGERS:
        raise TypeError(f"positions has dtype {positions.dtype}, but must be int64 or int32")
    if tuple(positions.shape) != (T,):
        raise ValueError(f"positions has shape {tuple(positions.shape)}, but must be ({T},): one for every token")
    check_floating("sin", sin, 2, "(N, head width)")
    check_floating("cos", cos, 2, "(N, head width)")
    head = width // (len(parts) * num_heads)
    if sin.shape != cos.shape or sin.shape[1] not in (head, head // 2):
        found = f"sin is {tuple(sin.shape)} and cos {tuple(cos.shape)}"
        raise ValueError(f"{found}, but both must be (N, {head}) or (N, {head // 2})")
    if special not in SPECIAL:
        raise ValueError(f"special is {special!r}, but must be one of {', '.join(SPECIAL)}")
    return sin.detach()[:, : head // 2], cos.detach()[:, : head // 2]


class _RotateInPlace(torch.autograd.Function):
    """Autograd of the mutating operator, which `register_autograd` does not support."""

    @staticmethod
    def forward(ctx, qkv, positions, sin, cos, rotated, zero):
        _rope_qk_(qkv, positions, sin, cos, rotated, zero, False)
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(positions, sin, cos)
        ctx.settings = (rotated, zero)
        return qkv

    @staticmethod
    def backward(ctx, grad):
        return _rotate_back(ctx, grad), None, None, None, None, None


def _rotate_back(ctx, grad: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        # The compiler removes the copy, as it knows all readers of the gradient; eager autograd does not.
        grad = grad.clone(memory_format=torch.contiguous_format)
        _rope_qk_(grad, *ctx.saved_tensors, *ctx.settings, True)
        return grad
    return _rope_qk(grad, *ctx.saved_tensors, *ctx.settings, True)


@torch.library.custom_op("fastmum::rope_qk_", mutates_args={"qkv"})
def _rope_qk_(qkv: Tensor, positions: Tensor, sin: Tensor, cos: Tensor, rotated: int, zero: bool, back: bool) -> None:
    _rotate(qkv, qkv, positions, sin, cos, rotated, zero, back)


_rope_qk_.register_fake(lambda *_: None)


@operator("rope_qk")
def _rope_qk(qkv: Tensor, positions: Tensor, sin: Tensor, cos: Tensor, rotated: int, zero: bool, back: bool) -> Tensor:
    out = empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _rotate(qkv.contiguous(), out, positions, sin, cos, rotated, zero, back)
    return out


register_fake(_rope_qk, lambda qkv, *_: qkv.new_empty(qkv.shape))


def _setup_context(ctx, inputs, output):
    _, positions, sin, cos, *settings, _ = inputs
    ctx.save_for_backward(positions, sin, cos)
    ctx.settings = settings


register_autograd(_rope_qk, lambda ctx, grad: (_rotate_back(ctx, grad), *(None,) * 6), setup_context=_setup_context)


def _rotate(qkv, out, positions, sin, cos, rotated, zero, inverse):
    """Write `qkv` with its first `rotated` heads rotated to `out`, which may be `qkv`; rows are contiguous."""
    check_range("positions", positions, -1, len(sin))
    if use_triton(qkv):
        _rotate_triton(qkv, None if out is qkv else out, positions, sin, cos, rotated, zero, inverse)
    else:
        _rotate_torch(qkv, out, positions, sin, cos, rotated, zero, inverse)


@planned
def _rotate_triton(qkv, out, positions, sin, cos, rotated, zero, inverse):
    T, width = qkv.shape
    half = sin.shape[1]
    sin, cos = (x if x.stride(1) == 1 else x.contiguous() for x in (sin, cos))
    BLOCK_C = power_of_2(half)
    BLOCK_H = min(power_of_2(rotated), max(1, 256 // BLOCK_C))
    BLOCK_T = max(1, tile_bytes(qkv.device) // (2 * BLOCK_H * BLOCK_C * qkv.element_size()))
    heads = rotated if out is None else width // (2 * half)  # in place, v is not touched
    out = qkv if out is None else out
    strides = qkv.stride(0), out.stride(0), sin.stride(0), cos.stride(0)
    args = qkv, out, positions.contiguous(), sin, cos, T, len(sin), *strides, -1.0 if inverse else 1.0
    blocks = {"BLOCK_T": BLOCK_T, "BLOCK_H": BLOCK_H, "BLOCK_C": BLOCK_C}
    constants = {"ROTATED": rotated, "HEADS": heads, "HALF": half, "ZERO": zero}
    launch(_rope_kernel, (ceil_div(T, BLOCK_T),), *args, **constants, **blocks, num_warps=4)


def _rotate_torch(qkv, out, positions, sin, cos, rotated, zero, inverse):
    width = qkv.shape[1]
    N, half = sin.shape
    end = 2 * half * rotated
    work = torch.promote_types(torch.promote_types(qkv.dtype, sin.dtype), torch.float32)
    # The last row is for tokens without a position.
    sin_Nc = torch.cat([-sin if inverse else sin, sin.new_zeros(1, half)]).to(work)
    cos_Nc = torch.cat([cos, cos.new_full((1, half), 0.0 if zero else 1.0)]).to(work)
    row_T = torch.where(positions < 0, N, positions)
    step = max(1, CHUNK_BYTES // (width * work.itemsize))
    for qkv_t, out_t, row_t in zip(qkv.split(step), out.split(step), row_T.split(step), strict=True):
        qk, qk_out = (x[:, :end].unflatten(1, (rotated, 2, half)) for x in (qkv_t, out_t))
        first, second = qk.to(work).unbind(2)
        sin_t1c, cos_t1c = (x.index_select(0, row_t)[:, None] for x in (sin_Nc, cos_Nc))
        values = (first * cos_t1c).addcmul_(second, sin_t1c, value=-1), (second * cos_t1c).addcmul_(first, sin_t1c)
        for half_out, value in zip(qk_out.unbind(2), values, strict=True):
            half_out.copy_(value)
        if out is not qkv:
            out_t[:, end:] = qkv_t[:, end:]


@jit(do_not_specialize=["T", "N"])
def _rope_kernel(
    qkv_ptr,  # (T, 3 * D), rows by the stride
    out_ptr,  # likewise; the same tensor in place
    positions_ptr,  # (T,)
    sin_ptr,  # (N, HALF), rows by the stride
    cos_ptr, T, N, stride_qkv, stride_out, stride_sin, stride_cos,
    sign,  # -1 for the inverse rotation
    ROTATED: tl.constexpr,  # heads that are rotated; the others are copied
    HEADS: tl.constexpr, HALF: tl.constexpr, ZERO: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    position = tl.load(positions_ptr + t, mask=t < T, other=-1)
    has_angle = ((position >= 0) & (position < N))[:, None] & (c < HALF)[None, :]
    # Position -1: the identity, or zero. A position out of range: NaN.
    idle = tl.where(position == -1, 0.0 if ZERO else 1.0, float("nan"))[:, None]
    sin = tl.load(sin_ptr + position[:, None] * stride_sin + c[None, :], mask=has_angle, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + position[:, None] * stride_cos + c[None, :], mask=has_angle, other=0.0).to(tl.float32)
    sin = (sin * sign)[:, None, :]
    cos = tl.where(has_angle, cos, idle)[:, None, :]

    t = t.to(tl.int64)[:, None, None]
    for first_head in tl.static_range(0, HEADS, BLOCK_H):
        head = (first_head + tl.arange(0, BLOCK_H))[None, :, None]
        at = head * (2 * HALF) + c[None, None, :]
        inside = (t < T) & (head < HEADS) & (c < HALF)[None, None, :]
        a = tl.load(qkv_ptr + t * stride_qkv + at, mask=inside, other=0.0)
        b = tl.load(qkv_ptr + t * stride_qkv + at + HALF, mask=inside, other=0.0)
        x, y = a.to(tl.float32), b.to(tl.float32)
        x, y = x * cos - y * sin, y * cos + x * sin
        x, y = x.to(a.dtype), y.to(b.dtype)
        if HEADS > ROTATED:
            x, y = tl.where(head < ROTATED, x, a), tl.where(head < ROTATED, y, b)
        tl.store(out_ptr + t * stride_out + at, x, mask=inside)
        tl.store(out_ptr + t * stride_out + at + HALF, y, mask=inside)
