"""rope_qk and its gradient against the float64 reference, in place and not."""

import pytest
import torch
from asserts import assert_refuses, check, check_compiles
from support import DEVICE, DTYPES, guarded, pairs, strided

from benchmarks import kernel_reference as reference
from fastmum.kernels import rope_qk

# Tokens, heads, head width, positions.
SIZES = [(1, 1, 48, 1), (37, 3, 64, 35), (7, 16, 48, 6), (35, 12, 64, 5), (5, 5, 2, 9), (3, 1, 1024, 4), (9, 4, 26, 8)]
SMALL = 9, 2, 16, 6


def problem(T: int, heads: int, d: int, N: int, dtype: torch.dtype, parts: str = "qkv") -> tuple[torch.Tensor, ...]:
    positions = torch.randint(-1, N, (T,), device=DEVICE)
    positions[0] = -1
    angles = torch.randn(N, d // 2, device=DEVICE).tile(2)
    qkv = torch.randn(T, len(parts) * heads * d, device=DEVICE).to(dtype)
    return guarded(qkv), guarded(positions), guarded(angles.sin()), guarded(angles.cos())


@pytest.mark.parametrize(
    ("size", "dtype", "special", "inplace", "parts"),
    pairs(SIZES, DTYPES, ["keep", "zero", "zero"], [False, True], ["qkv", "qkv", "kv", "qkv", "q"]),
)
def test_rotation(backend, monkeypatch, size, dtype, special, inplace, parts):
    monkeypatch.setattr("fastmum.kernels.rope.CHUNK_BYTES", 5000)  # the CPU rotates 1, 2 or 4 tokens at once, or all
    qkv, positions, sin, cos = problem(*size, dtype, parts)
    _, heads, d, _ = size
    weight = torch.randn(qkv.shape, device=DEVICE).to(dtype)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return rope_qk(x.clone() if inplace else x, positions, sin, cos, heads, special, inplace, parts)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return reference.rope_qk(x, positions, sin.to(x.dtype), cos.to(x.dtype), heads, special, parts)

    value = check(ours, plain, [qkv], weight)
    end = len(parts.removesuffix("v")) * heads * d  # v is unchanged, in both passes
    assert torch.equal(value[0][:, end:], qkv[:, end:])
    assert torch.equal(value[1][:, end:], weight[:, end:])
    if special == "zero":
        assert not value[0][0, :end].any()


def test_autograd_guards_the_overwritten(backend):
    """Neither a leaf nor a tensor that the producer's backward pass needs may be overwritten."""
    qkv, positions, sin, cos = problem(*SMALL, torch.float32)
    leaf = qkv.requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        rope_qk(leaf, positions, sin, cos, 2, inplace=True)
    out = rope_qk(leaf.exp(), positions, sin, cos, 2, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_half_tables_strides_and_int32(backend):
    qkv, positions, sin, cos = problem(*SMALL, torch.float32)
    expected = rope_qk(qkv, positions, sin, cos, 2)
    halves = sin[:, :8].contiguous(), strided(cos[:, :8])
    assert torch.equal(rope_qk(strided(qkv), strided(positions.int()), *halves, 2), expected)
    wide = torch.full((9, 100), float("nan"), device=DEVICE)
    wide[:, 2:98] = qkv
    assert rope_qk(wide[:, 2:98], positions, sin, cos, 2, inplace=True).data_ptr() == wide[:, 2:].data_ptr()
    assert torch.equal(wide[:, 2:98], expected)
    assert wide[:, :2].isnan().all()
    assert wide[:, 98:].isnan().all()


def test_offsets_beyond_32_bits(backend):
    qkv, positions, sin, cos = problem(3, 1, 16, 6, torch.float32)
    expected = rope_qk(qkv, positions, sin, cos, 1)
    stride = 2**30 + 64  # the third row starts after 2^31 elements. Unused memory costs nothing.
    far = torch.UntypedStorage(4 * (2 * stride + 48), device=DEVICE)
    far = torch.tensor([], device=DEVICE).set_(far, 0, (3, 48), (stride, 1)).copy_(qkv)
    assert torch.equal(rope_qk(far, positions, sin, cos, 1, inplace=True), expected)


def test_operators(backend):
    """Their schemas, fakes and gradients, and one graph."""
    qkv, positions, sin, cos = problem(*SMALL, torch.float32)
    args = (positions, sin[:, :8], cos[:, :8], 4, True, False)
    torch.library.opcheck(torch.ops.fastmum.rope_qk_.default, (qkv.clone(), *args))
    torch.library.opcheck(torch.ops.fastmum.rope_qk.default, (qkv.clone().requires_grad_(), *args))
    for inplace in (False, True):
        rotate = lambda x, y, i=inplace: rope_qk(x * y, positions, sin, cos, 2, "zero", i)  # noqa: E731
        check_compiles(rotate, [qkv, qkv.flip(0)], torch.randn_like(qkv))


@pytest.mark.exhaustive
def test_compiled_in_place_copies_nothing():
    """Inductor calls the mutating operator on the projection itself, forward and backward."""
    from torch._inductor.utils import run_fw_bw_and_get_code

    _, positions, sin, cos = problem(*SMALL, torch.float32)
    x, linear = torch.randn(9, 8, device=DEVICE), torch.nn.Linear(8, 96, device=DEVICE)

    def project(x: torch.Tensor) -> torch.Tensor:
        return rope_qk(linear(x), positions, sin, cos, 2, inplace=True).square()

    _, codes = run_fw_bw_and_get_code(lambda: torch.compile(project, fullgraph=True)(x))
    for code in codes:
        assert "torch.ops.fastmum.rope_qk_.default(buf" in code
        assert "copy" not in code.split("def call(")[1].split("rope_qk_.default(buf")[0].replace("copy_misaligned", "")


def test_refuses():
    args = {"qkv": torch.zeros(4, 48), "positions": torch.tensor([-1, 0, 1, 2]), "num_heads": 2}
    args |= {"sin": torch.zeros(3, 8), "cos": torch.ones(3, 8)}
    changes = {"qkv": torch.zeros(4, 48, dtype=torch.int64), "positions": torch.zeros(4)}
    assert_refuses(rope_qk, args, TypeError, **changes)
    changes = {"qkv": torch.zeros(4, 50), "positions": torch.zeros(5, dtype=torch.int64), "sin": torch.zeros(3, 7)}
    assert_refuses(rope_qk, args, ValueError, **changes, cos=torch.zeros(2, 8), special="drop", parts="vk")
    assert_refuses(rope_qk, args | {"inplace": True}, ValueError, qkv=torch.zeros(48, 4).t())
    for wrong in (3, -2):
        assert_refuses(rope_qk, args, IndexError, positions=torch.tensor([0, 1, 2, wrong]))
