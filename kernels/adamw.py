"""AdamW on many tensors in one launch, with the bfloat16 copies that a model computes with.

Each value is read and written once: gradient, master, both moments, copy. The table of addresses (`tables`) is made
at every step because gradients move.

The update is that of `torch.optim.AdamW`; where `found_inf` is set nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmum.kernels.dispatch import jit, launch, tl, use_triton
from fastmum.kernels.tables import CHUNK, chunk_of, make_table

COLUMNS = 5  # of the table: master, gradient, both moments, copy


def adamw_(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    found_inf: Tensor | None = None,
) -> None:
    """One step of AdamW, in place.

    Args:
        masters, exp_avgs, exp_avg_sqs: float32, of the same strides, without gaps.
        grads: of the same shapes and strides, all of one floating-point dtype.
        copies: of the same shapes and strides, all of one dtype, which become the rounded masters; or none at all.
        step: scalar, float32, on the device of the masters: number of this step, from 1.
        lr, betas, weight_decay, eps: as in `torch.optim.AdamW`.
        found_inf: scalar, float32, on the device of the masters: 1.0 skips everything.

    Raises:
        ValueError: lists of different lengths, or a tensor whose strides differ from its master's.
        TypeError: dtypes that differ within a list.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if copies:
        lists["copies"] = copies
    for name, tensors in lists.items():
        if len(tensors) != len(masters):
            raise ValueError(f"{name} has {len(tensors)} tensors, but there are {len(masters)} masters")
        if len({x.dtype for x in tensors}) > 1:
            raise TypeError(f"{name} has dtypes {sorted({str(x.dtype) for x in tensors})}, but must have one")
        for x, master in zip(tensors, masters, strict=True):
            if x.shape != master.shape or x.stride() != master.stride():
                raise ValueError(
                    f"{name} has a tensor of shape {tuple(x.shape)} and strides {x.stride()}, but its master has "
                    f"{tuple(master.shape)} and {master.stride()}"
                )
    if masters:
        args = *map(list, (masters, grads, exp_avgs, exp_avg_sqs, copies)), step, lr, *betas, weight_decay, eps
        # Nothing differentiates or compiles it: where PyTorch does it, the operator would only cost its dispatch.
        (_adamw_ if use_triton(masters[0]) else _adamw_torch)(*args, found_inf)


@torch.library.custom_op("fastmum::adamw_", mutates_args=("masters", "exp_avgs", "exp_avg_sqs", "copies"))
def _adamw_(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    found_inf: Tensor | None,
) -> None:
    run = _adamw_triton if use_triton(masters[0]) else _adamw_torch
    run(masters, grads, exp_avgs, exp_avg_sqs, copies, step, lr, beta1, beta2, weight_decay, eps, found_inf)


@_adamw_.register_fake
def _(masters, grads, exp_avgs, exp_avg_sqs, copies, step, lr, beta1, beta2, weight_decay, eps, found_inf):
    return None


def _adamw_torch(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    found_inf: Tensor | None,
) -> None:
    torch._fused_adamw_(
        masters,
        [grad.to(master.dtype) for grad, master in zip(grads, masters, strict=True)],
        exp_avgs,
        exp_avg_sqs,
        [],
        [step] * len(masters),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )
    if copies:
        torch._foreach_copy_(copies, masters)


def _adamw_triton(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    found_inf: Tensor | None,
) -> None:
    device = masters[0].device
    table = make_table((masters, grads, exp_avgs, exp_avg_sqs, copies or masters))
    typed = [torch.empty(0, dtype=x[0].dtype, device=device) for x in (grads, copies or masters)]
    launch(
        _adamw_kernel,
        (table.chunks,),
        *(table.words, *typed, step, found_inf, table.rows, lr, beta1, beta2, weight_decay, eps),
        COPY=bool(copies),
        ALIGN=table.align,
        CHUNK=CHUNK,
        COLUMNS=COLUMNS,
        BLOCK=1024,
        num_warps=4,
    )


@jit(do_not_specialize=["rows", "lr", "beta1", "beta2", "weight_decay", "eps"])
def _adamw_kernel(
    table_ptr,  # see `tables`
    grad_ptr,  # no values: its dtype is that of the gradients
    copy_ptr,  # the same for the copies
    step_ptr,  # scalar
    found_inf_ptr,  # scalar, or None
    rows,
    lr,
    beta1,
    beta2,
    weight_decay,
    eps,
    COPY: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes that divide all addresses
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if found_inf_ptr is not None:  # noqa: SIM102 (Triton decides the outer one when it compiles)
        if tl.load(found_inf_ptr) != 0.0:
            return
    row_ptr, begin, numel = chunk_of(table_ptr, rows, COLUMNS, CHUNK)
    float_ptr: tl.constexpr = tl.pointer_type(tl.float32)
    master_ptr = tl.multiple_of(tl.load(row_ptr).to(float_ptr), ALIGN)
    grads_ptr = tl.multiple_of(tl.load(row_ptr + 1).to(tl.pointer_type(grad_ptr.dtype.element_ty)), ALIGN)
    mean_ptr = tl.multiple_of(tl.load(row_ptr + 2).to(float_ptr), ALIGN)
    square_ptr = tl.multiple_of(tl.load(row_ptr + 3).to(float_ptr), ALIGN)
    copies_ptr = tl.multiple_of(tl.load(row_ptr + 4).to(tl.pointer_type(copy_ptr.dtype.element_ty)), ALIGN)
    step = tl.load(step_ptr)
    correction1 = 1.0 - tl.exp(step * tl.log(beta1))
    correction2 = tl.sqrt(1.0 - tl.exp(step * tl.log(beta2)))
    for first in range(0, CHUNK, BLOCK):
        at = begin + first + tl.arange(0, BLOCK)
        inside = at < numel
        grad = tl.load(grads_ptr + at, mask=inside, other=0.0).to(tl.float32)
        master = tl.load(master_ptr + at, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
        square = tl.load(square_ptr + at, mask=inside, other=0.0)
        master -= lr * weight_decay * master
        mean += (1.0 - beta1) * (grad - mean)
        square = beta2 * square + (1.0 - beta2) * grad * grad
        master -= lr / correction1 * mean / (tl.sqrt(square) / correction2 + eps)
        tl.store(master_ptr + at, master, mask=inside)
        tl.store(mean_ptr + at, mean, mask=inside)
        tl.store(square_ptr + at, square, mask=inside)
        if COPY:
            tl.store(copies_ptr + at, master.to(copy_ptr.dtype.element_ty), mask=inside)
