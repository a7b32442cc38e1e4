"""A float32 tensor as two 16-bit tensors: the bfloat16 tensor that a model computes with, and the rest.

The bits of a float32 are 65,536 * u + r, with u the bits of the nearest bfloat16 and -32,768 <= r < 32,768 the `rest`.
Ties (one float32 in 65,536) round away from zero. Ties to even, as in PyTorch, would leave no such pair: 65,537 values
would round to an even u. Bits grow with the magnitude, across exponents too, so the carry is correct; the largest
float32 values are infinite as bfloat16 and are restored exactly. NaN are restored as NaN with other bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmum.kernels.dispatch import jit, tl


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
