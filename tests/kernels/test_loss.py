"""patch_loss and its gradient against the float64 reference."""

import pytest
import torch
from asserts import assert_refuses, check, check_compiles, relative
from support import DEVICE, DTYPES, MEAN, STD, guarded, pairs, results, split_ids, strided

from benchmarks import kernel_reference as reference
from fastmum.kernels import patch_loss
from fastmum.kernels.loss import _launch

# Frames, rows, columns, patch side, masked.
SIZES = [(1, 1, 1, 16, 1), (1, 7, 5, 16, 34), (3, 7, 5, 8, 1), (2, 3, 4, 14, 9), (5, 4, 4, 16, 12), (2, 2, 3, 3, 3)]


def problem(F: int, rows: int, columns: int, p: int, M: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    frames = torch.randint(0, 256, (F, rows * p, columns * p, 3), dtype=torch.uint8, device=DEVICE)
    _, ids = split_ids(F, rows * columns, rows * columns - M)
    return guarded(torch.randn(F, M, 3 * p * p, device=DEVICE).to(dtype)), guarded(frames), guarded(ids)


@pytest.mark.parametrize(
    ("size", "dtype", "norm_pix", "reduction"), pairs(SIZES, DTYPES, [True, False, True], ["mean", "none"])
)
def test_loss_and_gradient(backend, size, dtype, norm_pix, reduction):
    """The loss of every frame is the reference's of that frame alone."""
    pred, frames, ids = problem(*size, dtype)
    p, is_mean = size[3], reduction == "mean"
    weight = torch.tensor(3.0, device=DEVICE) if is_mean else torch.rand(size[0], device=DEVICE) + 0.5

    def plain(x: torch.Tensor) -> torch.Tensor:
        each = zip(*(y.split(1) for y in (x, frames, ids)), strict=True)
        losses = torch.stack([reference.patch_loss(*one, MEAN, STD, p, norm_pix) for one in each])
        return losses.mean() if is_mean else losses

    args = frames, ids, MEAN, STD, p, norm_pix
    loss, _ = check(lambda x: patch_loss(x, *args, reduction=reduction), plain, [pred], weight)
    assert loss.dtype == torch.float32


def test_float64_and_floating_point_frames(backend):
    pred, frames, ids = torch.randn(2, 3, 192).double(), torch.randn(2, 3, 24, 16), split_ids(2, 6, 3)[1].cpu()
    args, weight = (ids, (0.0,) * 3, (1.0,) * 3, 8), torch.ones(())
    truth = results(lambda x: reference.patch_loss(x, frames.permute(0, 2, 3, 1), *args), [pred], weight)
    ours = results(lambda x: patch_loss(x, frames, *args), [pred], weight)
    assert max(map(relative, ours, truth)) < 1e-12
    on_device = [x.to(DEVICE) for x in (pred.float(), frames, ids)]
    assert relative(patch_loss(*on_device, *args[1:]).cpu(), truth[0]) < 1e-5


def test_not_contiguous(backend):
    pred, *inputs = problem(2, 3, 2, 8, 4, torch.float32)
    apart = [strided(x) for x in inputs]
    plain = lambda x: reference.patch_loss(x, *inputs, MEAN, STD, 8)  # noqa: E731
    check(lambda x: patch_loss(x, *apart, MEAN, STD, 8), plain, [strided(pred)], torch.ones((), device=DEVICE))


def test_constant_patch_has_target_zero(backend):
    """Variance 0: the target is 0, not a rounding error over sqrt(eps)."""
    frames = torch.full((1, 16, 16, 3), 137, dtype=torch.uint8, device=DEVICE)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    pred = torch.zeros(1, 1, 768, device=DEVICE, requires_grad=True)
    loss = patch_loss(pred, frames, ids, (0.3,) * 3, (0.7,) * 3, 16)
    assert loss.item() <= 1e-12
    assert float(torch.autograd.grad(loss, pred)[0].norm()) <= 1e-8


def test_ids_out_of_range_give_nan_on_the_gpu():
    """Without the check of the CPU, nothing out of bounds is read."""
    pytest.importorskip("triton")
    pred, frames, _ = problem(2, 2, 2, 8, 2, torch.float32)
    ids, losses = torch.tensor([[4, 0], [-1, 3]], device=DEVICE), torch.zeros(4, device=DEVICE)
    _launch(losses, None, pred, frames, ids, (1.0,) * 3, (0.0,) * 3, 8, True, 1e-6)
    assert losses.isnan().tolist() == [True, False, True, False]


def test_operator(backend):
    """Its schema, fakes and gradient, and one graph."""
    pred, frames, ids = problem(2, 2, 3, 8, 4, torch.float32)
    check_compiles(lambda x: patch_loss(x, frames, ids, MEAN, STD, 8), [pred], torch.ones((), device=DEVICE))
    args = frames, ids, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], 8, True, 1e-6
    torch.library.opcheck(torch.ops.fastmum.patch_loss_backward.default, (torch.ones(2, device=DEVICE), pred, *args))
    torch.library.opcheck(torch.ops.fastmum.patch_loss.default, (pred.clone().requires_grad_(), *args))


def test_refuses():
    args = {"pred": torch.zeros(2, 1, 768), "frames": torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "patch_size": 16}
    args |= {"ids": torch.zeros(2, 1, dtype=torch.int64), "mean": MEAN, "std": STD}
    assert_refuses(patch_loss, args, TypeError, pred=torch.zeros(2, 1, 768, dtype=torch.int64))
    assert_refuses(patch_loss, args, ValueError, pred=torch.zeros(2, 2, 768), reduction="sum")
    assert_refuses(patch_loss, args, IndexError, ids=torch.full((2, 1), 9))
    args["ids"] = torch.zeros(2, 0, dtype=torch.int64)
    assert_refuses(patch_loss, args, ValueError, pred=torch.zeros(2, 0, 768))
