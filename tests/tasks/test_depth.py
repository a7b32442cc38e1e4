"""Heads of depth: DINOv2's order of operations, losses by hand, schedules, images of any size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastmum
from fastmum.geometry import View
from fastmum.tasks.depth import (
    HEADS,
    DepthHead,
    EncodedImages,
    HeadKind,
    fit_patches,
    gradient_loss,
    head_blocks,
    learning_rate_factor,
    momentum,
    predict_depth,
    sig_loss,
)


def tokens(blocks=2, width=6, grid=(3, 4), batch=2):
    rng = torch.Generator().manual_seed(0)
    patch = torch.randn(batch, blocks, grid[0] * grid[1], width, generator=rng, dtype=torch.float64)
    return patch, torch.randn(batch, blocks, width, generator=rng, dtype=torch.float64), grid


def test_logits_are_those_of_the_upsampled_features():
    """DINOv2 concatenates maps and CLS of each block, upsamples, then applies the convolution."""
    patch, cls, grid = tokens()
    head = DepthHead(HEADS["lin4"], 6, 2, 10.0).double()
    maps = [
        torch.cat([patch[:, i].mT.unflatten(2, grid), cls[:, i, :, None, None].expand(2, 6, *grid)], 1) for i in (0, 1)
    ]
    features = F.interpolate(torch.cat(maps, 1), scale_factor=4, mode="bilinear", align_corners=False)
    z = F.conv2d(features, head.conv_depth.weight, head.conv_depth.bias)
    torch.testing.assert_close(head(patch, cls, grid), z)
    weights = z.relu() + 0.1
    expected = (weights / weights.sum(1, keepdim=True) * torch.linspace(1e-3, 10, 256).view(1, -1, 1, 1)).sum(1)
    torch.testing.assert_close(head.depth(z)[:, 0], expected, rtol=1e-6, atol=1e-6)


def test_losses_by_hand():
    rng = torch.Generator().manual_seed(0)
    depth, true = (1 + torch.rand(2, 1, 16, 14, generator=rng, dtype=torch.float64) for _ in range(2))
    true[torch.rand(true.shape, generator=rng) < 0.3] = 0
    known = (true > 0)[:, 0].numpy()
    g = np.log(depth[:, 0].numpy() + 1e-3) - np.log(true[:, 0].numpy() + 1e-3)
    values = g[known]
    expected = np.sqrt(values.var(ddof=1) + 0.15 * values.mean() ** 2)
    assert sig_loss(depth, true).item() == pytest.approx(expected)
    assert sig_loss(depth, true, mean_only=True).item() == pytest.approx(np.sqrt(0.15) * abs(values.mean()))
    expected = 0.0
    for stride in (1, 2, 4, 6):
        part, mask, total = g[:, ::stride, ::stride], known[:, ::stride, ::stride], 0.0
        for b, i, j in np.argwhere(mask):
            for k, m in ((i + 2, j), (i, j + 2)):
                if k < mask.shape[1] and m < mask.shape[2] and mask[b, k, m]:
                    total += abs(part[b, k, m] - part[b, i, j])
        expected += total / mask.sum()
    assert gradient_loss(depth, true).item() == pytest.approx(expected)
    nothing = torch.zeros_like(true)
    leaf = depth.clone().requires_grad_()
    (sig_loss(leaf, nothing) + gradient_loss(leaf, nothing)).backward()
    assert leaf.grad.abs().max() == 0


@pytest.mark.parametrize(("kind", "loss"), [("lin4", "sig"), ("lin1-nocls", "cross_entropy"), ("dinov3", "sig")])
def test_heads_fit_depth_that_is_linear_in_tokens(kind, loss):
    patch, cls, grid = tokens(1, batch=8)
    patch[..., 0] = torch.linspace(-1, 1, patch[..., 0].numel()).view(patch.shape[:3])
    true = F.interpolate(2 + patch[:, :, :, 0].unflatten(2, grid), scale_factor=4, mode="nearest").float()
    head = DepthHead(HeadKind(**{**vars(HEADS[kind]), "layers": 1}), 6, 1, 4.0, loss)
    optimizer, data = torch.optim.AdamW(head.parameters(), 0.05), (patch.float(), cls.float(), grid)
    for step in range(150):
        optimizer.zero_grad()
        head.losses(head(*data), true, step < 5).backward()
        optimizer.step()
    depth = F.interpolate(head.eval().depth(head(*data)), true.shape[2:], mode="bilinear")
    assert ((depth - true).abs() / true).mean() < 0.1
    constant = true.log().mean().exp()
    assert ((constant - true).abs() / true).mean() > 0.2


def test_depth_beyond_the_bins_is_no_class():
    head, logits = DepthHead(HEADS["lin1"], 6, 1, 4.0, "cross_entropy"), torch.zeros(1, 256, 2, 2, requires_grad=True)
    true = torch.tensor([[[[1e-3, 4.0], [5.0, 0.0]]]])
    head._cross_entropy(logits, true).backward()
    assert (logits.grad.abs().sum(1)[0] > 0).tolist() == [[True, True], [False, False]]
    assert logits.grad[0, :, 0, 0].argmin() == 0
    assert logits.grad[0, :, 0, 1].argmin() == 255


def test_schedules():
    factor = [learning_rate_factor(step, 38_400) for step in range(38_400)]
    assert factor[0] == pytest.approx(1e-3)
    assert factor[12_800] == pytest.approx(0.75)
    assert np.argmax(factor) == pytest.approx(12_800, abs=1)
    assert factor[6_400] == pytest.approx(0.5005 * (1 + np.cos(np.pi / 6)) / 2, rel=1e-4)
    assert 0 < factor[-1] < 1e-7
    beta = [momentum(step, 38_400) for step in (0, 5_760, 11_519, 24_959, 38_399)]
    assert beta == pytest.approx([0.95, 0.90, 0.85, 0.90, 0.95], abs=1e-4)
    assert [head_blocks(depth, 4) for depth in (12, 24, 40)] == [[2, 5, 8, 11], [4, 11, 17, 23], [9, 19, 29, 39]]
    assert (head_blocks(24, 1), head_blocks(2, 4)) == ([23], [0, 1])
    for steps in (1, 2, 3):  # no division by zero
        assert all(0 < learning_rate_factor(i, steps) <= 1 and 0.85 <= momentum(i, steps) <= 0.95 for i in range(steps))


def test_images_of_any_size_are_padded_and_mirrored():
    encoder = fastmum.load_encoder("random:mum_tiny", patch_size=8)
    image = np.random.default_rng(0).integers(0, 256, (36, 45, 3), dtype=np.uint8)
    fitted = fit_patches(View(image, None, np.ones((36, 45), np.float32)), encoder)
    assert fitted.image.shape == (40, 48, 3)
    assert np.array_equal(fitted.image[2:38, 1:46], image)
    assert fitted.depth.sum() == 36 * 45
    torch.manual_seed(0)
    heads = [DepthHead.of(encoder, HEADS[name], 10.0).eval() for name in ("lin4", "lin1-nocls", "dinov3")]
    depth = predict_depth(heads, encoder, image)
    assert depth.shape == (3, 36, 45)
    # The mean of an image and its mirror image is the same for the mirror image, but for where the padding is odd.
    even = image[:, :44]
    mirrored = predict_depth(heads, encoder, np.ascontiguousarray(even[:, ::-1]))
    torch.testing.assert_close(predict_depth(heads, encoder, even).flip(-1), mirrored, rtol=1e-4, atol=1e-4)
    normed = EncodedImages(encoder, torch.from_numpy(fitted.image[None])).of(HEADS["dinov3"])[0]
    (expected,) = encoder.tokens(torch.from_numpy(fitted.image[None]), norm=True)
    torch.testing.assert_close(normed[:, 0], expected.patch, rtol=1e-2, atol=1e-2)  # tokens are kept in float16
