"""gather_patches against the float64 reference."""

import pytest
import torch
from asserts import assert_close, assert_refuses, relative
from support import DEVICE, DTYPES, MEAN, STD, guarded, pairs, split_ids, strided

from benchmarks import kernel_reference as reference
from fastmum.kernels import gather_patches
from fastmum.kernels.patches import _gather_patches_triton

# Frames, rows, columns, patch side, visible.
SIZES = [(1, 7, 5, 16, 1), (3, 7, 5, 8, 34), (2, 3, 4, 14, 12), (5, 4, 4, 16, 4), (2, 2, 3, 5, 3), (1, 3, 2, 1, 2)]


def random_frames(F: int, rows: int, columns: int, p: int, C: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (F, rows * p, columns * p, C), dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize(("size", "dtype"), [*pairs(SIZES, DTYPES), (SIZES[1], torch.float16)])
def test_uint8(backend, size, dtype):
    F, rows, columns, p, K = size
    frames, (ids, _) = guarded(random_frames(F, rows, columns, p)), split_ids(F, rows * columns, K)
    out = gather_patches(frames, guarded(ids), MEAN, STD, p, dtype)
    truth = reference.gather_patches(frames, ids, MEAN, STD, p, torch.float64)
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
    args = ids, (0.0,) * 3, (1.0,) * 3, 16
    out = gather_patches(given_frames, *args, torch.float32)
    assert relative(out, reference.gather_patches(frames, *args, torch.float64)) == 0


@pytest.mark.parametrize(("channels", "ids"), [(1, [[3, 3], [0, 3]]), (4, [[1, 2], [2, 0]]), (3, [[], []])])
def test_strided_int32_ids_other_channels_and_tensor_statistics(backend, channels, ids):
    """Ids may repeat, or be none."""
    frames, ids = random_frames(2, 2, 2, 8, channels), torch.tensor(ids, dtype=torch.int32, device=DEVICE)
    mean, std = torch.rand(channels), torch.rand(channels) + 0.5
    out = gather_patches(strided(frames), strided(ids), mean, std, 8, torch.float32)
    assert_close(out, reference.gather_patches(frames, ids.long(), mean.tolist(), std.tolist(), 8, torch.float64))


def test_ids_out_of_range_give_nan_on_the_gpu():
    """Without the check of the CPU, nothing out of bounds is read."""
    pytest.importorskip("triton")
    frames, ids = guarded(random_frames(2, 2, 2, 8)), torch.tensor([[4, 0], [-1, 3]], device=DEVICE)
    out = _gather_patches_triton(frames, ids, (1.0,) * 3, (0.0,) * 3, 8, torch.float32)
    assert out.isnan().float().mean(-1).tolist() == [[1, 0], [1, 0]]


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
    changes = {"dtype": torch.int64, "ids": torch.zeros(2, 1), "frames": torch.zeros(2, 32, 32, 3, dtype=torch.int32)}
    assert_refuses(gather_patches, args, TypeError, **changes)
    changes = {"ids": torch.zeros(3, 1, dtype=torch.int64), "std": (1.0, 1.0)}
    for frames in (torch.zeros(2, 32, 32, 4, dtype=torch.uint8), torch.zeros(2, 32, 30, 3, dtype=torch.uint8)):
        assert_refuses(gather_patches, args, ValueError, **changes, frames=frames)
    for wrong in (4, -1):
        assert_refuses(gather_patches, args, IndexError, ids=torch.full((2, 1), wrong))
    assert_refuses(gather_patches, args, TypeError, frames="x")
    assert_refuses(gather_patches, args, ValueError, ids=args["ids"].to("meta"))
