"""A float32 tensor as two of 16 bits: the bfloat16 tensor that a model computes with, and what that lacks.

The bits of a float32 are 65,536 * u + r, with u the bits of its upper half and -32,768 <= r < 32,768 the `rest`. The
upper half is then the nearest bfloat16, and both together are the float32 exactly. Between two bfloat16 the halfway
value (one float32 of 65,536) goes away from zero. With ties to even, as PyTorch rounds, there would be no such pair:
an even u is then the rounding of 65,537 values. Bits grow with the magnitude, also from the last of an exponent to the
first of the next, so that the carry is right; the largest float32 are infinite as bfloat16, and come back.

NaN come back as NaN, with other bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmum.kernels.dispatch import jit, tl


def join(parameter: Tensor, rest: Tensor) -> Tensor:
    """The float32 tensor of which `parameter` (bfloat16) and `rest` (int16) are the halves, of their layout."""
    master = parameter.to(torch.float32)  # u * 65,536, as bits
    master.view(torch.int32).add_(rest)
    return master


def split_(master: Tensor, parameter: Tensor, rest: Tensor) -> None:
    """Fill `parameter` (bfloat16) and `rest` (int16) with the halves of `master`, float32 of the same shape."""
    bits = master.view(torch.int32)
    rest.copy_(bits)  # the lowest 16 bits, as a signed number
    nearest = (bits - rest).view(torch.float32)
    # Too small a term for any rounding to see, but NaN, of which a carry may have made another value, are NaN again.
    parameter.copy_(nearest.add_(master, alpha=1e-30))


class Halves(NamedTuple):
    """A float32 tensor kept as its halves.

    Args:
        parameter: bfloat16, the tensor rounded to nearest.
        rest: int16, of the same shape and strides.
    """

    parameter: Tensor
    rest: Tensor

    @classmethod
    def of(cls, master: Tensor) -> Halves:
        """New halves of a float32 tensor."""
        halves = cls(torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16))
        halves.fill_(master)
        return halves

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.parameter.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return torch.float32

    @property
    def nbytes(self) -> int:
        """Of the tensor, and of its halves."""
        return self.parameter.nbytes + self.rest.nbytes

    def join(self) -> Tensor:
        """The tensor, in memory of its own."""
        return join(self.parameter, self.rest)

    def fill_(self, master: Tensor) -> None:
        """Become the halves of another tensor."""
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
