"""rotary_projection and its gradients against the float64 reference, with fused and with library products."""

import pytest
import torch
from asserts import assert_equal, assert_refuses, check, check_compiles, check_frozen
from support import DEVICE, DTYPES, guarded, pairs, strided
from torch import Tensor

from benchmarks import kernel_reference as reference
from fastmum.kernels import rotary_projection

# Tokens, width of x, heads, head width, positions.
SIZES = [(1, 16, 1, 48, 1), (37, 48, 3, 64, 35), (140, 33, 16, 48, 6), (7, 130, 5, 12, 9), (9, 64, 2, 256, 8)]
SMALL = (9, 16, 2, 16, 6)


pytestmark = pytest.mark.usefixtures("products")


def problem(size: tuple[int, ...], dtype: torch.dtype, parts: str = "qkv") -> tuple[list[Tensor], ...]:
    """x, weight and bias; positions and tables; weights of the outputs."""
    T, C, heads, d, N = size
    rows = len(parts) * heads * d
    inputs = torch.randn(T, C), torch.randn(rows, C) * C**-0.5, torch.randn(rows)
    positions = torch.randint(-1, N, (T,), device=DEVICE)
    positions[0] = -1
    angles = torch.randn(N, d // 2, device=DEVICE).tile(2)
    tables = [guarded(y) for y in (positions, angles.sin(), angles.cos())]
    weights = [torch.randn(T, heads, d, device=DEVICE).to(dtype) for _ in parts]
    return [guarded(y.to(DEVICE, dtype)) for y in inputs], tables, weights


@pytest.mark.parametrize(
    ("size", "parts", "dtype", "special"), pairs(SIZES, ["qkv", "kv", "q"], DTYPES, ["keep", "zero", "zero"])
)
def test_projection(backend, size, dtype, parts, special):
    inputs, (positions, *tables), weights = problem(size, dtype, parts)
    settings = size[2], special, parts

    def plain(*y: Tensor) -> tuple[Tensor, ...]:
        return reference.rotary_projection(*y, positions, *(x.to(y[0].dtype) for x in tables), *settings)

    found = check(lambda *y: rotary_projection(*y, positions, *tables, *settings), plain, inputs, *weights)
    if special == "zero":
        assert not any(part[0].any() for part, name in zip(found, parts, strict=False) if name != "v")


@pytest.mark.parametrize(
    ("needed", "unsaved", "products_of_backward"),
    [((0, 1, 2), (), 2), ((0,), (0,), 1), ((1,), (1,), 1), ((2,), (0, 1), 0)],
)
def test_frozen_inputs(backend, needed, unsaved, products_of_backward):
    inputs, tables, weights = problem(SIZES[1], torch.bfloat16)
    operations = products_of_backward * 2 * 37 * 48 * (3 * 3 * 64)
    check_frozen(lambda *y: rotary_projection(*y, *tables, 3), inputs, weights, needed, unsaved, operations)


def test_gradients_by_any_stride(backend):
    """Attention returns (segments, heads, tokens, width) viewed as (tokens, heads, width)."""
    _, (positions, *tables), weights = problem(SIZES[1], torch.bfloat16)
    sin, cos = (table[:, :32] for table in tables)
    pack = torch.ops.fastmum.pack_rotated
    turned = [weights[0].transpose(0, 1).contiguous().transpose(0, 1), strided(weights[1]), weights[2]]
    assert_equal(*(pack(grads, positions, sin, cos, 2, True) for grads in (turned, weights)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators(backend, dtype):
    """Their schemas and fakes, and one graph."""
    inputs, (positions, sin, cos), weights = problem(SMALL, dtype)
    tables = positions, sin[:, :8], cos[:, :8]
    torch.library.opcheck(torch.ops.fastmum.rotary_linear.default, (*inputs, *tables, 4, True))
    torch.library.opcheck(torch.ops.fastmum.pack_rotated.default, (weights, *tables, 2, True))
    project = lambda *y: rotary_projection(*y, positions, sin, cos, 2, "zero")  # noqa: E731
    check_compiles(project, inputs, *weights, autocast=False)


def test_refuses():
    args = {"x": torch.zeros(4, 16), "weight": torch.zeros(48, 16), "bias": torch.zeros(48), "num_heads": 2}
    args |= {"positions": torch.tensor([-1, 0, 1, 2]), "sin": torch.zeros(3, 8), "cos": torch.ones(3, 8)}
    assert_refuses(rotary_projection, args, TypeError, x=torch.zeros(4, 16, dtype=torch.bfloat16))
    changes = {"weight": torch.zeros(48, 15), "bias": torch.zeros(47), "positions": torch.zeros(5, dtype=torch.int64)}
    assert_refuses(rotary_projection, args, ValueError, **changes)
    assert_refuses(rotary_projection, args, IndexError, positions=torch.tensor([-1, 0, 1, 3]))
