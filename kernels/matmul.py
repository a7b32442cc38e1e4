"""Matrix products of the library, and tiles of products for kernels that process a product in registers.

On CPUs without bfloat16 instructions the library multiplies bfloat16 in plain loops, 8 to 180 times slower than
float32. There `product` and `linear` widen the operands, which does not change their values, and round the result once.

Legend of tiles: an (M, N) product of a (M, K) and b; M varies with the batch, N and K do not. Operands are bfloat16 or
float16, sums float32. `FASTMUM_PRODUCTS`, read at the first call: "fused" processes products in kernels wherever Triton
runs and operands have 16 bits; "library" uses cuBLAS and separate kernels for the operations after it; "auto" (default)
is the one that was measured to be faster, and unmeasured "fused" before sm_90. On the CPU, and where launches are
recorded, it is "fused".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.kernels.dispatch import architecture, ceil_div, choice, is_recorded, jit, tl, use_triton

SLOW_BFLOAT16 = not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # no AVX-512 or later
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
GROUP_M = 8  # rows of tiles that are processed together, so that their operands stay in the L2 cache


def widens(x: Tensor) -> bool:
    """Whether products with `x` are computed in float32 and rounded."""
    return SLOW_BFLOAT16 and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (..., M, K) @ b (..., K, N) + bias (N,), all of one dtype; matrices only if there is a bias."""
    if widens(a):
        with torch.autocast("cpu", enabled=False):
            wide = a.float() @ b.float()
            return (wide if bias is None else wide.add_(bias)).to(a.dtype)
    return a @ b if bias is None else torch.addmm(bias, a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., K) @ weight' (N, K) + bias (N,), all of one dtype; differentiable."""
    return _Linear.apply(x, weight, bias) if widens(x) else F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return product(x.flatten(0, -2), weight.t(), bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        (x, weight), rows = ctx.saved_tensors, grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight) if needs_x else None,
            product(rows.t(), x.flatten(0, -2)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


Key = tuple[str, int, int, torch.dtype]  # operation, rows and columns of its weight, and dtype
measured: dict[Key, bool] = {}  # whether the fused kernel is faster, by `fastmum.model.products`


def products_choice() -> str:
    """`FASTMUM_PRODUCTS`; ValueError for an unknown value."""
    return choice("FASTMUM_PRODUCTS", "auto", "fused", "library")


def fuses_products(x: Tensor, operation: str, weight: Tensor) -> bool:
    """Whether the product of `x` with `weight` and the operations after it are one kernel."""
    chosen = products_choice()
    if chosen == "library" or x.dtype not in SIXTEEN_BITS or not use_triton(x):
        return False
    if chosen == "fused" or is_recorded() or not x.is_cuda:
        return True
    known = measured.get((operation, *weight.shape, x.dtype))
    return architecture(x.device) < 90 if known is None else known


class Tiles(NamedTuple):
    """Sizes of tiles, and the warps and stages of their programs.

    A program of 4 warps has at most 255 registers and 98 kB of shared memory, so that a multiprocessor holds two: one
    multiplies while the other computes what follows its product.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def of(cls, device: torch.device, BLOCK_M: int = 128) -> "Tiles":
        """Tiles of 128 columns: sm_90 multiplies 64 of the inner size at once, sm_80 has less shared memory."""
        return cls(BLOCK_M, 128, 64) if architecture(device) >= 90 else cls(BLOCK_M, 128, 32, num_stages=4)

    def constants(self, K: int, x: Tensor) -> dict[str, object]:
        """Constants and options of a kernel."""
        return self._asdict() | {"GROUP_M": GROUP_M, "EVEN_K": K % self.BLOCK_K == 0, "WIDEN": x.device.type == "cpu"}

    def grid(self, M: int, columns: int) -> tuple[int]:
        return (ceil_div(M, self.BLOCK_M) * columns,)


@jit()
def tile_of(M, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of this program's tile."""
    program = tl.program_id(0)
    rows = tl.cdiv(M, BLOCK_M)
    group = program // (GROUP_M * COLUMNS)
    height = tl.minimum(rows - group * GROUP_M, GROUP_M)
    inside = program % (GROUP_M * COLUMNS)
    return group * GROUP_M + inside % height, inside // height


@jit()
def product_tile(
    a_ptr,  # (M, K)
    b_ptr,  # (N, K), or (K, N) where b is not transposed
    row,  # of the tile
    n,  # (BLOCK_N,) columns of the product
    M,
    exists,  # (BLOCK_N,) whether the column exists
    N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,  # in the interpreter, which would multiply bit patterns of bfloat16
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) float32: the tile's rows and columns n of a @ b' or a @ b."""
    i, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    # Only the start of the tile needs 64 bits.
    a_at = a_ptr + row.to(tl.int64) * (BLOCK_M * K) + (i[:, None] * K + k[None, :])
    b_at = b_ptr + (n[None, :] * K + k[:, None] if TRANSPOSED else k[:, None] * N + n[None, :])
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        a_inside, b_inside = (row * BLOCK_M + i < M)[:, None], exists[None, :]
        if not EVEN_K:
            a_inside, b_inside = a_inside & (first + k < K)[None, :], b_inside & (first + k < K)[:, None]
        a = tl.load(a_at, mask=a_inside, other=0.0)
        b = tl.load(b_at, mask=b_inside, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc)
        a_at += BLOCK_K
        b_at += BLOCK_K if TRANSPOSED else BLOCK_K * N
    return acc


@jit()
def columns_of(x, PARTS: tl.constexpr):
    """The columns of a tile as one part, or as two of equal width: a tuple."""
    if PARTS == 2:
        first, second = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        parts = (first, second)
    else:
        parts = (x,)
    return parts
