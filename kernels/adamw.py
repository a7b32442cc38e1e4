"""AdamW on many tensors in one launch: float32 weights, or their two 16-bit halves.

Every value is read and written once. `Update` keeps the table of addresses between steps.

The bits of a float32 are 65,536 * u + r, with u the bits of the nearest bfloat16, the weight of the model, and
-32,768 <= r < 32,768 the `rest`. Ties (one float32 in 65,536) round away from zero. Ties to even, as in PyTorch,
would leave no such pair: 65,537 values would round to an even u. Bits grow with the magnitude, across exponents too, so
the carry is correct; the largest float32 values are infinite as bfloat16 and are restored exactly. NaN are restored as
NaN with other bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, methodcaller
from typing import NamedTuple

import torch
from torch import Tensor

from fastmum.kernels.dispatch import jit, launch, tl, use_triton
from fastmum.kernels.tables import CHUNK, KeptTable, addresses_of, check_lists, chunk_of, is_plain, make_table

_kind, _strides = attrgetter("dtype"), methodcaller("stride")
COLUMNS = 5  # of the table: weight, gradient, both moments, rest


def join(parameter: Tensor, rest: Tensor) -> Tensor:
    """The float32 tensor with the halves `parameter` (bfloat16) and `rest` (int16), in their layout."""
    master = parameter.to(torch.float32)  # u * 65,536, as bits
    master.view(torch.int32).add_(rest)
    return master


def split_(master: Tensor, parameter: Tensor, rest: Tensor) -> None:
    """Fill `parameter` (bfloat16) and `rest` (int16) with the halves of `master`, float32 of the same shape."""
    bits = master.view(torch.int32)
    rest.copy_(bits)  # the lowest 16 bits, as a signed number
    nearest = (bits - rest).view(torch.float32)
    # The added term vanishes in rounding, but restores NaN, which the carry may have changed to another value.
    parameter.copy_(nearest.add_(master, alpha=1e-30))


class Halves(NamedTuple):
    """A float32 tensor stored as its halves."""

    parameter: Tensor  # bfloat16, the tensor rounded to nearest
    rest: Tensor  # int16, of the same shape and strides

    @classmethod
    def of(cls, master: Tensor) -> Halves:
        """Split a float32 tensor into new halves."""
        halves = cls(torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16))
        halves.fill_(master)
        return halves

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def nbytes(self) -> int:
        return self.parameter.nbytes + self.rest.nbytes

    def join(self) -> Tensor:
        """The float32 tensor, a copy."""
        return join(self.parameter, self.rest)

    def fill_(self, master: Tensor) -> None:
        """Store another float32 tensor of the same shape."""
        split_(master, self.parameter, self.rest)


def adamw_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    rests: Sequence[Tensor], step: Tensor, lr: float, betas: tuple[float, float], weight_decay: float, eps: float,
    found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of `torch.optim.AdamW`, in place.

    ValueError: lists of different lengths, or a tensor whose shape or strides differ from its weight's. TypeError:
    another dtype, or several in a list.

    Args:
        weights: dense, float32 or the bfloat16 halves of float32 weights.
        grads: of the same shapes and strides, all of one floating-point dtype.
        exp_avgs, exp_avg_sqs: of the same shapes and strides, float32.
        rests: of the same shapes and strides, int16: the other halves of bfloat16 weights; empty for float32 ones.
        step: scalar, float32, on the device of the weights: number of this step, from 1.
        lr, betas, weight_decay, eps: as in `torch.optim.AdamW`.
        found_inf: scalar, float32, on the device of the weights: 1.0 skips the update.
    """
    check_adamw(weights, grads, exp_avgs, exp_avg_sqs, rests)
    if weights:
        args = *map(list, (weights, grads, exp_avgs, exp_avg_sqs, rests)), step, lr, *betas, weight_decay, eps
        # The PyTorch implementation needs no operator, whose dispatch would cost time.
        (_adamw_ if use_triton(weights[0]) else _adamw_torch)(*args, found_inf)


def check_adamw(
    weights: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    rests: Sequence[Tensor],
) -> None:  # fmt: skip
    """Check the lists of `adamw_`."""
    moments = {"exp_avgs": (exp_avgs, torch.float32), "exp_avg_sqs": (exp_avg_sqs, torch.float32)}
    dtype = torch.bfloat16 if rests else torch.float32
    check_lists(weights=(weights, dtype), grads=(grads, None), **moments, rests=(rests, torch.int16))


@torch.library.custom_op("fastmum::adamw_", mutates_args=("weights", "exp_avgs", "exp_avg_sqs", "rests"))
def _adamw_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    rests: Sequence[Tensor], step: Tensor, lr: float, beta1: float, beta2: float, weight_decay: float, eps: float,
    found_inf: Tensor | None,
) -> None:  # fmt: skip
    run = _adamw_triton if use_triton(weights[0]) else _adamw_torch
    run(weights, grads, exp_avgs, exp_avg_sqs, rests, step, lr, beta1, beta2, weight_decay, eps, found_inf)


_adamw_.register_fake(lambda *_: None)


def _adamw_torch(weights, grads, exp_avgs, exp_avg_sqs, rests, step, lr, beta1, beta2, weight_decay, eps, found_inf):
    masters = [join(*halves) for halves in zip(weights, rests, strict=True)] if rests else weights
    lists = masters, [grad.to(torch.float32) for grad in grads], exp_avgs, exp_avg_sqs, [], [step] * len(masters)
    rates = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
    torch._fused_adamw_(*lists, **rates, amsgrad=False, maximize=False, found_inf=found_inf)
    for master, weight, rest in zip(masters, weights, rests, strict=False):
        split_(master, weight, rest)


def _adamw_triton(weights, grads, exp_avgs, exp_avg_sqs, rests, *settings):
    table = make_table((weights, grads, exp_avgs, exp_avg_sqs, rests or weights))
    _launch(table, grads[0].dtype, bool(rests), *settings)


def _launch(table, grad_dtype, split, step, lr, beta1, beta2, weight_decay, eps, found_inf):
    typed = torch.empty(0, dtype=grad_dtype, device=table.words.device)
    args = table.words, typed, step, found_inf, table.rows, lr, beta1, beta2, weight_decay, eps
    constants = {"SPLIT": split, "ALIGN": table.align, "DIVISOR": table.divisor, "COLUMNS": COLUMNS}
    launch(_adamw_kernel, (table.chunks,), *args, **constants, CHUNK=CHUNK, BLOCK=1024, num_warps=4)


class Update:
    """`adamw_` of the same weights at every step: what stays is checked, and its addresses are copied, once.

    Args:
        weights, exp_avgs, exp_avg_sqs, rests: as of `adamw_`, at least one weight; their memory must not move.
    """

    def __init__(
        self, weights: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
        rests: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self._weights, self._moments, self._rests = list(weights), (list(exp_avgs), list(exp_avg_sqs)), list(rests)
        self._table = KeptTable([weights], [exp_avgs, exp_avg_sqs, rests or weights])
        self._kinds: tuple[list, list] = [], []

    def __call__(
        self, grads: Sequence[Tensor], step: Tensor, lr: float, betas: tuple[float, float], weight_decay: float,
        eps: float, found_inf: Tensor | None = None,
    ) -> None:  # fmt: skip
        """One step; arguments and errors as of `adamw_`."""
        weights = self._weights
        if not is_plain(weights[0]) or not use_triton(weights[0]):
            adamw_(weights, grads, *self._moments, self._rests, step, lr, betas, weight_decay, eps, found_inf)
            return
        kinds = [*map(_kind, grads)], [*map(_strides, grads)]
        if kinds != self._kinds:
            check_adamw(weights, grads, *self._moments, self._rests)
            self._kinds = kinds
        table = self._table.of(grads, addresses_of(grads))
        _launch(table, grads[0].dtype, bool(self._rests), step, lr, *betas, weight_decay, eps, found_inf)


@jit(do_not_specialize=["rows", "lr", "beta1", "beta2", "weight_decay", "eps"])
def _adamw_kernel(
    table_ptr,  # see `make_table`
    grad_ptr,  # empty, of the gradients' dtype
    step_ptr,  # scalar
    found_inf_ptr,  # scalar, or None
    rows, lr, beta1, beta2, weight_decay, eps,
    SPLIT: tl.constexpr,  # weights are halves
    ALIGN: tl.constexpr,  # divides all addresses, bytes
    DIVISOR: tl.constexpr,  # divides all numbers of values
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:  # noqa: SIM102 (Triton decides the outer one when it compiles)
        if tl.load(found_inf_ptr) != 0.0:
            return
    row_ptr, begin, numel = chunk_of(table_ptr, rows, COLUMNS, CHUNK, DIVISOR)
    float_ptr: tl.constexpr = tl.pointer_type(tl.float32)
    # Halves as bits.
    weight_type: tl.constexpr = tl.pointer_type(tl.int16 if SPLIT else tl.float32)
    weight_ptr = tl.multiple_of(tl.load(row_ptr).to(weight_type), ALIGN)
    grads_ptr = tl.multiple_of(tl.load(row_ptr + rows).to(tl.pointer_type(grad_ptr.dtype.element_ty)), ALIGN)
    mean_ptr = tl.multiple_of(tl.load(row_ptr + 2 * rows).to(float_ptr), ALIGN)
    square_ptr = tl.multiple_of(tl.load(row_ptr + 3 * rows).to(float_ptr), ALIGN)
    rest_ptr = tl.multiple_of(tl.load(row_ptr + 4 * rows).to(tl.pointer_type(tl.int16)), ALIGN)
    step = tl.load(step_ptr)
    correction1 = 1.0 - tl.exp(step * tl.log(beta1))
    correction2 = tl.sqrt(1.0 - tl.exp(step * tl.log(beta2)))
    for first in range(0, CHUNK, BLOCK):
        at = begin + first + tl.arange(0, BLOCK)
        inside = at < numel
        grad = tl.load(grads_ptr + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + at, mask=inside, other=0)
        mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
        square = tl.load(square_ptr + at, mask=inside, other=0.0)
        if SPLIT:
            weight = join_bits(weight, tl.load(rest_ptr + at, mask=inside, other=0))
        weight -= lr * weight_decay * weight
        mean += (1.0 - beta1) * (grad - mean)
        square = beta2 * square + (1.0 - beta2) * grad * grad
        weight -= lr / correction1 * mean / (tl.sqrt(square) / correction2 + eps)
        if SPLIT:
            weight, rest = split_bits(weight)
            tl.store(rest_ptr + at, rest, mask=inside)
        tl.store(weight_ptr + at, weight, mask=inside)
        tl.store(mean_ptr + at, mean, mask=inside)
        tl.store(square_ptr + at, square, mask=inside)


@jit()
def join_bits(high, rest):
    """float32 of the bits of a bfloat16 and a rest, both int16."""
    return ((high.to(tl.int32) << 16) + rest.to(tl.int32)).to(tl.float32, bitcast=True)


@jit()
def split_bits(master):
    """The bits of the bfloat16 and the rest of a float32, both int16."""
    bits = master.to(tl.int32, bitcast=True)
    rest = tl.where(master == master, bits, 0).to(tl.int16)  # NaN: no carry
    return ((bits - rest.to(tl.int32)) >> 16).to(tl.int16), rest
