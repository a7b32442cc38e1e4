"""rotary_projection and its gradients against the float64 reference: products fused and not."""

from __future__ import annotations

import pytest
import torch
from support import DEVICE, assert_close, guarded, strided

from fastmum.kernels import reference, rotary_projection

SIZES = [  # tokens, width of x, heads, head width, positions
    (1, 16, 1, 48, 1),
    (37, 48, 3, 64, 35),
    (140, 33, 16, 48, 6),
    (7, 130, 5, 12, 9),
    (9, 64, 2, 256, 8),
]


@pytest.fixture(params=["auto", "library"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMUM_PRODUCTS", request.param)


def problem(size: tuple[int, ...], parts: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """x, weight and bias; positions and tables."""
    T, C, heads, d, N = size
    rows = len(parts) * heads * d
    inputs = torch.randn(T, C), torch.randn(rows, C) * C**-0.5, torch.randn(rows)
    positions = torch.randint(-1, N, (T,), device=DEVICE)
    positions[0] = -1
    angles = torch.randn(N, d // 2, device=DEVICE).tile(2)
    return [guarded(y.to(DEVICE, dtype)) for y in inputs], [guarded(y) for y in (positions, angles.sin(), angles.cos())]


def results(function, inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """All parts, and the gradients of the inputs for their sum, weighted."""
    inputs = [y.detach().requires_grad_() for y in inputs]
    outs = function(*inputs)
    loss = sum((out * weight.to(out.dtype)).sum() for out, weight in zip(outs, weights, strict=True))
    return [*(out.detach() for out in outs), *torch.autograd.grad(loss, inputs)]


def weights_of(size: tuple[int, ...], parts: str, dtype: torch.dtype) -> list[torch.Tensor]:
    T, _, heads, d, _ = size
    return [torch.randn(T, heads, d, device=DEVICE).to(dtype) for _ in parts]


@pytest.mark.parametrize("special", ["keep", "zero"])
@pytest.mark.parametrize("parts", ["qkv", "kv", "q"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_projection(backend: str, size: tuple[int, ...], dtype: torch.dtype, parts: str, special: str) -> None:
    inputs, (positions, sin, cos) = problem(size, parts, dtype)
    weights, settings = weights_of(size, parts, dtype), (size[2], special, parts)
    ours = results(lambda *y: rotary_projection(*y, positions, sin, cos, *settings), inputs, weights)
    usual = results(
        lambda *y: reference.rotary_projection(*y, positions, sin.to(dtype), cos.to(dtype), *settings), inputs, weights
    )
    truth = results(
        lambda *y: reference.rotary_projection(*y, positions, sin.double(), cos.double(), *settings),
        [y.double() for y in inputs],
        [y.double() for y in weights],
    )
    for value, true, of_torch in zip(ours, truth, usual, strict=True):
        if true.norm() < 1e-10:  # all tokens are CLS, whose queries are zero: rounding errors of nothing
            assert not value.any()
        else:
            assert_close(value, true, of_torch)
    if special == "zero":
        assert not any(part[0].any() for part, name in zip(ours, parts, strict=False) if name != "v")


def test_gradients_by_any_stride(backend: str) -> None:
    """Attention returns (spans, heads, tokens, width) seen as (tokens, heads, width)."""
    size = SIZES[1]
    inputs, tables = problem(size, "qkv", torch.bfloat16)
    weights = weights_of(size, "qkv", torch.bfloat16)
    operator = torch.ops.fastmum.pack_rotated
    sin, cos = (table[:, :32] for table in tables[1:])
    expected = operator(weights, tables[0], sin, cos, 2, True)
    turned = [weights[0].transpose(0, 1).contiguous().transpose(0, 1), strided(weights[1]), weights[2]]
    assert all(torch.equal(a, b) for a, b in zip(operator(turned, tables[0], sin, cos, 2, True), expected, strict=True))
    del inputs


def test_the_same_twice(backend: str) -> None:
    size = (300, 32, 3, 64, 20)
    inputs, tables = problem(size, "qkv", torch.bfloat16)
    weights = weights_of(size, "qkv", torch.bfloat16)
    first, second = (results(lambda *y: rotary_projection(*y, *tables, 3), inputs, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_positions_out_of_range(backend: str) -> None:
    inputs, (positions, sin, cos) = problem(SIZES[1], "qkv", torch.bfloat16)
    positions[3] = 35
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match="holds 35"):
            rotary_projection(*inputs, positions, sin, cos, 3)


def test_operator_contracts(backend: str) -> None:
    size = (9, 16, 2, 16, 6)
    inputs, (positions, sin, cos) = problem(size, "qkv", torch.bfloat16)
    tables = positions, sin[:, :8], cos[:, :8]
    torch.library.opcheck(torch.ops.fastmum.rotary_linear.default, (*inputs, *tables, 4, True))
    grads = weights_of(size, "qkv", torch.bfloat16)
    torch.library.opcheck(torch.ops.fastmum.pack_rotated.default, (grads, *tables, 2, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_in_one_graph(dtype: torch.dtype) -> None:
    size = (9, 16, 2, 16, 6)
    inputs, tables = problem(size, "qkv", dtype)
    weights = weights_of(size, "qkv", dtype)
    compiled = torch.compile(rotary_projection, fullgraph=True, backend="aot_eager")
    ours, plain = (
        results(lambda *y, f=f: f(*y, *tables, 2, "zero"), inputs, weights) for f in (compiled, rotary_projection)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 16, dtype=torch.bfloat16)}, TypeError, "one dtype"),
        ({"weight": torch.zeros(48, 15)}, ValueError, r"\(T, C\)"),
        ({"bias": torch.zeros(47)}, ValueError, r"3 \* D"),
        ({"positions": torch.zeros(5, dtype=torch.int64)}, ValueError, "one for every token"),
        ({"sin": torch.zeros(3, 7)}, ValueError, "must be"),
        ({"parts": "vk"}, ValueError, "qkv, kv, q"),
        ({"special": "drop"}, ValueError, "keep, zero"),
        ({"num_heads": 5}, ValueError, "48 wide"),
    ],
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    args = {"x": torch.zeros(4, 16), "weight": torch.zeros(48, 16), "bias": torch.zeros(48)}
    args |= {"positions": torch.tensor([-1, 0, 1, 2]), "sin": torch.zeros(3, 8), "cos": torch.ones(3, 8)}
    with pytest.raises(error, match=message):
        rotary_projection(**{"num_heads": 2} | args | change)
