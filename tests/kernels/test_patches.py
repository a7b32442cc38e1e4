"""gather_patches against the float64 reference."""

import pytest
import torch
from asserts import assert_close, assert_refuses, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICE, DTYPES, MEAN, STD, each_backend, guarded, pairs, split_ids, strided

from fastmum.kernels import gather_patches, reference
from fastmum.kernels.patches import _gather_patches_triton

# Frames, rows, columns, patch side, visible.
SIZES = [(1, 1, 1, 16, 1), (1, 7, 5, 16, 1), (3, 7, 5, 8, 34), (2, 3, 4, 14, 12), (5, 4, 4, 16, 4), (2, 2, 3, 5, 3)]


def random_frames(F: int, rows: int, columns: int, p: int, C: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (F, rows * p, columns * p, C), dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize(("size", "dtype"), [*pairs(SIZES, DTYPES), (SIZES[2], torch.float16)])
def test_uint8(backend, size, dtype):
    F, rows, columns, p, K = size
    frames, (ids, _) = guarded(random_frames(F, rows, columns, p)), split_ids(F, rows * columns, K)
    out = gather_patches(frames, guarded(ids), MEAN, STD, p, dtype)
    truth = reference.gather_patches(frames, ids, MEAN, STD, p, torch.float64)
    assert out.shape == (F, K, 3 * p * p)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, truth, reference.gather_patches(frames, ids, MEAN, STD, p, dtype))


@pytest.mark.parametrize(("layout", "dtype"), [*zip(["last", "first", "strided", "flipped"], 2 * DTYPES, strict=True)])
def test_floating_point_frames_of_any_layout(backend, layout, dtype):
    frames, (ids, _) = torch.randn(2, 48, 32, 3, device=DEVICE).to(dtype), split_ids(2, 6, 4)
    given_frames = {
        "last": guarded(frames), "first": guarded(frames.permute(0, 3, 1, 2)), "strided": strided(frames),
        "flipped": guarded(frames.transpose(1, 2)).transpose(1, 2),
    }[layout]  # fmt: skip
    out = gather_patches(given_frames, ids, (0.0,) * 3, (1.0,) * 3, 16, torch.float32)
    truth = reference.gather_patches(frames, ids, (0.0,) * 3, (1.0,) * 3, 16, torch.float64)
    assert relative(out, truth) == 0


@pytest.mark.parametrize("channels", [1, 4])
def test_strided_int32_ids_other_channels_and_tensor_statistics(backend, channels):
    frames, (ids, _) = random_frames(2, 2, 2, 8, channels), split_ids(2, 4, 3, torch.int32)
    mean, std = torch.rand(channels), torch.rand(channels) + 0.5
    out = gather_patches(strided(frames), strided(ids), mean, std, 8, torch.float32)
    truth = reference.gather_patches(frames, ids.long(), mean.tolist(), std.tolist(), 8, torch.float64)
    assert_close(out, truth)


def test_repeated_ids_and_no_ids(backend):
    frames = random_frames(2, 2, 2, 8)
    ids = torch.tensor([[3, 3], [0, 3]], device=DEVICE)
    truth = reference.gather_patches(frames, ids, MEAN, STD, 8, torch.float64)
    assert_close(gather_patches(frames, ids, MEAN, STD, 8, torch.float32), truth)
    assert gather_patches(frames, ids[:, :0], MEAN, STD, 8, torch.float32).shape == (2, 0, 192)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2, 3, 4, 8, 14, 16]), st.data())
def test_any_shape(F, rows, columns, p, data):
    K = data.draw(st.integers(1, rows * columns))
    for _ in each_backend():
        frames, (ids, _) = guarded(random_frames(F, rows, columns, p)), split_ids(F, rows * columns, K)
        truth = reference.gather_patches(frames, ids, MEAN, STD, p, torch.float64)
        assert_close(gather_patches(frames, ids, MEAN, STD, p, torch.float32), truth)


def test_ids_out_of_range_give_nan_on_the_gpu():
    """Without the check of the CPU, nothing out of bounds is read."""
    pytest.importorskip("triton")
    frames, ids = guarded(random_frames(2, 2, 2, 8)), torch.tensor([[4, 0], [-1, 3]], device=DEVICE)
    out = _gather_patches_triton(frames, ids, [1.0] * 3, [0.0] * 3, 8, torch.float32)
    assert out.isnan().all(-1).tolist() == [[True, False], [True, False]]
    assert not out[:, 1].isnan().any()


def test_offsets_beyond_32_bits(backend):
    frames, (ids, _) = random_frames(3, 1, 2, 8), split_ids(3, 2, 1)
    stride = 2**31 - 16  # fits 32 bits; the third frame's offset does not. Unused memory costs nothing.
    far = torch.empty(2 * stride + 384, dtype=torch.uint8, device=DEVICE)
    far = far.as_strided((3, 8, 16, 3), (stride, 48, 3, 1)).copy_(frames)
    truth = reference.gather_patches(frames, ids, MEAN, STD, 8, torch.float64)
    assert_close(gather_patches(far, ids, MEAN, STD, 8, torch.float32), truth)


def test_operator_contract_and_one_graph(backend):
    frames, (ids, _) = random_frames(2, 2, 3, 8), split_ids(2, 6, 2)
    args = (frames, ids, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], 8, torch.bfloat16)
    torch.library.opcheck(torch.ops.fastmum.gather_patches.default, args)
    compiled = torch.compile(gather_patches, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        out = compiled(frames, ids, MEAN, STD, 8, torch.float32)
    assert torch.equal(out, gather_patches(frames, ids, MEAN, STD, 8, torch.float32))


def test_refuses():
    args = {"frames": torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "ids": torch.zeros(2, 1, dtype=torch.int64)}
    args |= {"mean": MEAN, "std": STD, "patch_size": 16, "dtype": torch.float32}
    changes = [
        ({"frames": "x"}, TypeError, "frames is a str"),
        ({"frames": torch.zeros(2, 32, 32, 3, dtype=torch.int32)}, TypeError, "frames has dtype torch.int32"),
        ({"frames": torch.zeros(2, 32, 32, 4, dtype=torch.uint8)}, ValueError, r"frames has shape \(2, 32, 32, 4\)"),
        ({"frames": torch.zeros(2, 32, 30, 3, dtype=torch.uint8)}, ValueError, "32 x 30 pixels"),
        ({"ids": torch.zeros(2, 1)}, TypeError, "ids has dtype torch.float32"),
        ({"ids": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"ids has shape \(3, 1\)"),
        ({"ids": torch.full((2, 1), 4)}, IndexError, r"ids holds 4.*0..3"),
        ({"ids": torch.full((2, 1), -1)}, IndexError, "ids holds -1"),
        ({"ids": torch.zeros(2, 1, dtype=torch.int64, device="meta")}, ValueError, "ids is on meta"),
        ({"std": (1.0, 1.0)}, ValueError, "std 2"),
        ({"dtype": torch.int64}, TypeError, "dtype is torch.int64"),
    ]
    assert_refuses(gather_patches, args, changes)
