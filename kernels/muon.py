"""The parts of Muon (Jordan 2024): momentum, orthogonalization of stacks of matrices, update of the weights.

Momentum and update process many tensors in one launch, by a table of addresses, and raise errors, as `adamw_` does.
Coefficients (a, b, c) are of polynomials a s + b s^3 + c s^5, applied one after another to all singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from fastmum.kernels.adamw import join, join_bits, split_, split_bits
from fastmum.kernels.checks import check_floating
from fastmum.kernels.dispatch import jit, launch, tl, use_triton
from fastmum.kernels.matmul import SIXTEEN_BITS, widens
from fastmum.kernels.symmetric import symmetric_product
from fastmum.kernels.tables import CHUNK, check_lists, chunk_of, make_table

Coefficients = Sequence[tuple[float, float, float]]

# Jordan 2024, "Muon: an optimizer for hidden layers in neural networks".
NEWTON_SCHULZ: Coefficients = 5 * ((3.4445, -4.7750, 2.0315),)
# Amsel, Persson, Musco, Gower 2025, "The Polar Express", algorithm 1: polynomials 2 to 5 of those for singular values
# from 1e-3 of the norm on, divided by a safety factor of 1.01. The first mainly stretches those below 1 / 240, which
# stay smaller without it; the second then starts from a norm of `STRETCHED`, where the first would end.
STRETCHED = 1.9917
POLAR_EXPRESS: Coefficients = tuple(
    (a * scale, b * scale**3, c * scale**5)
    for scale, a, b, c in (
        (STRETCHED / 1.01, 4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (1 / 1.01, 3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (1 / 1.01, 3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (1 / 1.01, 2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)
NORM_MARGIN = 1.01  # algorithm 1: singular values start at most at 1 / 1.01
EPS = 1e-12  # matrices of smaller norms become smaller
CPU_PIECE = 1 << 20  # values that stay in the cache of a CPU during all steps


def orthogonalize(x: Tensor, coefficients: Coefficients) -> Tensor:
    """Approximate polar factor U V' of every matrix U S V', at any scale; zeros for a matrix of zeros.

    Args:
        x: (n, r, c) floating point. Products have its dtype, the norms are float32.
        coefficients: of the steps, `POLAR_EXPRESS` or `NEWTON_SCHULZ`.

    Returns:
        (n, r, c) in the dtype of x. TypeError or ValueError: another dtype or shape.
    """
    check_floating("x", x, 3, "(n, r, c)")
    if widens(x):
        return orthogonalize(x.float(), coefficients).to(x.dtype)
    if x.shape[1] > x.shape[2]:  # the Gram matrix of the rows is the smaller one
        return orthogonalize(x.mT, coefficients).mT
    piece = max(1, CPU_PIECE // max(1, x.shape[1] * x.shape[2]))
    if len(x) > piece and x.device.type == "cpu" and not use_triton(x):
        return torch.cat([orthogonalize(some, coefficients) for some in x.split(piece)])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=dtype)
    x = torch.div(x, norm * NORM_MARGIN + EPS, out=torch.empty_like(x))
    together = steps_together(x)
    for first in range(0, len(coefficients), together):
        some = coefficients[first : first + together]
        gram, factors = symmetric_product(x), None
        for i, (a, b, c) in enumerate(some):
            factor = symmetric_product(gram, c, gram, b)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            factors = factor if factors is None else torch.bmm(factor, factors)
            if i + 1 < len(some):
                gram = torch.bmm(factor, torch.bmm(gram, factor))
        x = torch.bmm(factors, x)
    return x


def steps_together(x: Tensor) -> int:
    """Steps of `orthogonalize` between two products with x (n, r, c), r <= c.

    A step multiplies x by a polynomial of its Gram matrix x x', and the Gram matrix by the square of that polynomial:
    several steps need only products of r x r (Zhang, Amsel, Chen, Dao 2026, "Gram Newton-Schulz"), which is less work
    from two columns per row on. Rounding makes small eigenvalues of the Gram matrix negative, and steps enlarge them:
    it is computed anew after every second step in half precision, after four in float32.
    """
    if x.shape[2] < 2 * x.shape[1]:
        return 1
    return 2 if x.dtype in SIXTEEN_BITS else 4


def momentum_(
    momenta: Sequence[Tensor], grads: Sequence[Tensor], updates: Sequence[Tensor], beta: float,
    found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """momentum = beta * momentum + (1 - beta) * grad, and Nesterov's update beta * momentum + (1 - beta) * grad.

    Args:
        momenta: dense, float32; changed in place.
        grads: of the same shapes and strides, all of one floating-point dtype.
        updates: of the same shapes and strides, all of one floating-point dtype; overwritten. Empty if not wanted.
        beta: share of the old momentum.
        found_inf: scalar, float32, on the device of the momenta: 1.0 keeps the momenta, and the updates become zero.
    """
    check_lists(momenta=(momenta, torch.float32), grads=(grads, None), updates=(updates or momenta, None))
    if momenta:
        run = _momentum_ if use_triton(momenta[0]) else _momentum_torch
        run(list(momenta), list(grads), list(updates), beta, found_inf)


def apply_(
    weights: Sequence[Tensor], rests: Sequence[Tensor], updates: Sequence[Tensor], rate: float,
    scales: Sequence[float], weight_decay: float, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """weight -= rate * (scale * update + weight_decay * weight), in place.

    Args:
        weights: dense, float32 or the bfloat16 halves of float32 weights.
        rests: of the same shapes and strides, int16: the other halves of bfloat16 weights; empty for float32 ones.
        updates: of the same shapes and strides, all of one floating-point dtype.
        rate: the learning rate.
        scales: a factor of every update.
        weight_decay: as in `torch.optim.AdamW`.
        found_inf: scalar, float32, on the device of the weights: 1.0 keeps the weights.
    """
    dtype = torch.bfloat16 if rests else torch.float32
    check_lists(weights=(weights, dtype), updates=(updates, None), rests=(rests, torch.int16))
    if len(scales) != len(weights):
        raise ValueError(f"scales has {len(scales)} numbers, but there are {len(weights)} weights")
    if weights:
        run = _apply_ if use_triton(weights[0]) else _apply_torch
        run(list(weights), list(rests), list(updates), rate, list(scales), weight_decay, found_inf)


@torch.library.custom_op("fastmum::momentum_", mutates_args=("momenta", "updates"))
def _momentum_(
    momenta: Sequence[Tensor], grads: Sequence[Tensor], updates: Sequence[Tensor], beta: float,
    found_inf: Tensor | None,
) -> None:  # fmt: skip
    (_momentum_triton if use_triton(momenta[0]) else _momentum_torch)(momenta, grads, updates, beta, found_inf)


_momentum_.register_fake(lambda *_: None)


@torch.library.custom_op("fastmum::apply_", mutates_args=("weights", "rests"))
def _apply_(
    weights: Sequence[Tensor], rests: Sequence[Tensor], updates: Sequence[Tensor], rate: float,
    scales: Sequence[float], weight_decay: float, found_inf: Tensor | None,
) -> None:  # fmt: skip
    run = _apply_triton if use_triton(weights[0]) else _apply_torch
    run(weights, rests, updates, rate, scales, weight_decay, found_inf)


_apply_.register_fake(lambda *_: None)


def _momentum_torch(momenta, grads, updates, beta, found_inf):
    skip = None if found_inf is None else found_inf != 0
    for momentum, grad, update in zip_longest(momenta, grads, updates):  # one tensor after another stays in the cache
        difference = grad - momentum
        if skip is not None:  # without a wait for the device
            difference.masked_fill_(skip, 0.0)
        momentum.add_(difference, alpha=1 - beta)
        if update is not None:
            torch.add(momentum, difference, alpha=beta * (1 - beta), out=update)
            if skip is not None:
                update.masked_fill_(skip, 0.0)


def _apply_torch(weights, rests, updates, rate, scales, weight_decay, found_inf):
    skip = None if found_inf is None else found_inf != 0
    for weight, rest, update, scale in zip_longest(weights, rests, updates, scales):
        master = weight if rest is None else join(weight, rest)
        delta = torch.add(master * weight_decay, update, alpha=scale)
        if skip is not None:
            delta.masked_fill_(skip, 0.0)
        master.sub_(delta, alpha=rate)
        if rest is not None:
            split_(master, weight, rest)


def _momentum_triton(momenta, grads, updates, beta, found_inf):
    table = make_table((momenta, grads, updates or momenta))
    types = [torch.empty(0, dtype=some[0].dtype, device=momenta[0].device) for some in (grads, updates or momenta)]
    constants = {"UPDATE": bool(updates), "ALIGN": table.align, "DIVISOR": table.divisor, "COLUMNS": 3}
    args = table.words, *types, found_inf, table.rows, beta
    launch(_momentum_kernel, (table.chunks,), *args, **constants, CHUNK=CHUNK, BLOCK=1024, num_warps=4)


def _apply_triton(weights, rests, updates, rate, scales, weight_decay, found_inf):
    table = make_table((weights, updates, rests or weights), scales)
    typed = torch.empty(0, dtype=updates[0].dtype, device=weights[0].device)
    constants = {"SPLIT": bool(rests), "ALIGN": table.align, "DIVISOR": table.divisor, "COLUMNS": 4}
    args = table.words, typed, found_inf, table.rows, rate, weight_decay
    launch(_apply_kernel, (table.chunks,), *args, **constants, CHUNK=CHUNK, BLOCK=1024, num_warps=4)


@jit(do_not_specialize=["rows", "beta"])
def _momentum_kernel(
    table_ptr,  # see `make_table`: momentum, gradient, update
    grad_ptr,  # empty, of the gradients' dtype
    update_ptr,  # empty, of the updates' dtype
    found_inf_ptr,  # scalar, or None
    rows, beta,
    UPDATE: tl.constexpr,  # updates are wanted
    ALIGN: tl.constexpr, DIVISOR: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    skip = False
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0.0
    row_ptr, begin, numel = chunk_of(table_ptr, rows, COLUMNS, CHUNK, DIVISOR)
    mean_ptr = tl.multiple_of(tl.load(row_ptr).to(tl.pointer_type(tl.float32)), ALIGN)
    grads_ptr = tl.multiple_of(tl.load(row_ptr + rows).to(tl.pointer_type(grad_ptr.dtype.element_ty)), ALIGN)
    ahead_ptr = tl.multiple_of(tl.load(row_ptr + 2 * rows).to(tl.pointer_type(update_ptr.dtype.element_ty)), ALIGN)
    for first in range(0, CHUNK, BLOCK):
        at = begin + first + tl.arange(0, BLOCK)
        inside = at < numel
        mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grads_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.where(skip, mean, mean + (1.0 - beta) * (grad - mean))
        tl.store(mean_ptr + at, mean, mask=inside)
        if UPDATE:
            ahead = tl.where(skip, 0.0, mean + (1.0 - beta) * (grad - mean))
            tl.store(ahead_ptr + at, ahead.to(update_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows", "rate", "weight_decay"])
def _apply_kernel(
    table_ptr,  # see `make_table`: weight, update, rest, scale
    update_ptr,  # empty, of the updates' dtype
    found_inf_ptr,  # scalar, or None
    rows, rate, weight_decay,
    SPLIT: tl.constexpr,  # weights are halves
    ALIGN: tl.constexpr, DIVISOR: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:  # noqa: SIM102 (Triton decides the outer one when it compiles)
        if tl.load(found_inf_ptr) != 0.0:
            return
    row_ptr, begin, numel = chunk_of(table_ptr, rows, COLUMNS, CHUNK, DIVISOR)
    weight_type: tl.constexpr = tl.pointer_type(tl.int16 if SPLIT else tl.float32)  # halves as bits
    weight_ptr = tl.multiple_of(tl.load(row_ptr).to(weight_type), ALIGN)
    updates_ptr = tl.multiple_of(tl.load(row_ptr + rows).to(tl.pointer_type(update_ptr.dtype.element_ty)), ALIGN)
    rest_ptr = tl.multiple_of(tl.load(row_ptr + 2 * rows).to(tl.pointer_type(tl.int16)), ALIGN)
    scale = tl.load(row_ptr + 3 * rows).to(tl.int32).to(tl.float32, bitcast=True)
    for first in range(0, CHUNK, BLOCK):
        at = begin + first + tl.arange(0, BLOCK)
        inside = at < numel
        update = tl.load(updates_ptr + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + at, mask=inside, other=0)
        if SPLIT:
            weight = join_bits(weight, tl.load(rest_ptr + at, mask=inside, other=0))
        weight -= rate * (scale * update + weight_decay * weight)
        if SPLIT:
            weight, rest = split_bits(weight)
            tl.store(rest_ptr + at, rest, mask=inside)
        tl.store(weight_ptr + at, weight, mask=inside)
