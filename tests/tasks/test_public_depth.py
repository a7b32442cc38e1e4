"""Numbers of DINOv2's and DINOv3's public code: the linear depth head, its losses and gradients, as files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from public_files import files, part_of, sizes_of
from safetensors.torch import load_file
from torch import Tensor

from fastmum.tasks.depth import GRADIENT_WEIGHT, DepthHead, HeadKind, gradient_loss, resize, sig_loss


@pytest.mark.parametrize("file", files("depth", "head.safetensors"))
def test_public_depth_head(file: Path):
    tensors, sizes = load_file(file), sizes_of(file)
    B, blocks = sizes["B"], sizes["layers"]
    patch = torch.stack([tensors[f"input/map_{i}"].flatten(2).mT for i in range(blocks)], 1)
    with_cls = sizes["cls_concat"]
    cls = torch.stack([tensors[f"input/cls_{i}"] for i in range(blocks)], 1) if with_cls else None
    kind = HeadKind(cls=with_cls, upsample=sizes["upsample"])
    head = DepthHead(kind, sizes["dim"], blocks, sizes["max_depth"], "sig", sizes["bins"], sizes["min_depth"])
    head.load_state_dict(part_of(tensors, "weights/") | {"bins": head.bins})
    true, limit = tensors["input/gt"], sizes["max_depth"]
    low = head.depth(head(patch, cls, tuple(sizes["grid"])))
    depth = resize(low, true.shape[2:])
    assert depth.shape == (B, 1, *true.shape[2:])
    for found, name in ((low, "low"), (depth, "full"), (depth.clamp(sizes["min_depth"], limit), "full_clamped")):
        torch.testing.assert_close(found, tensors[f"output/depth_{name}"], rtol=1e-5, atol=1e-5)
    true = torch.where(true <= limit, true, 0)  # the public losses leave out what is beyond
    sig, gradient = sig_loss(depth, true), GRADIENT_WEIGHT * gradient_loss(depth, true)
    expected = {
        "sig": sig, "sig_dinov3": sig, "gradlog_dinov3_x0.5": gradient,
        "sig_warm": (warm := sig_loss(depth, true, mean_only=True)), "sig_dinov3_warm": warm,
    }  # fmt: skip
    for name, found in expected.items():
        torch.testing.assert_close(found, tensors[f"loss/{name}"], rtol=1e-5, atol=1e-6)
    # |g[i + 2] - g[i]| and ReLU have kinks, whose side rounding may choose: an entry may be off by what its gradient
    # varies when the tokens move by 1e-6 of themselves, which is next to nothing away from kinks.
    torch.manual_seed(0)
    moved = [gradients(head, patch * (1 + 1e-6 * torch.randn(patch.shape)), cls, sizes, true) for _ in range(16)]
    for (name, found), *others in zip(gradients(head, patch, cls, sizes, true), *moved, strict=True):
        expected, every = tensors[f"grad/{name}"], torch.stack([found, *(other for _, other in others)])
        off = (found - expected).abs() - (every.amax(0) - every.amin(0))
        assert off.max() < 1e-4 * expected.abs().max(), name


def gradients(
    head: DepthHead, patch: Tensor, cls: Tensor | None, sizes: dict[str, Any], true: Tensor
) -> list[tuple[str, Tensor]]:
    """Those of the sum of both losses, by parameter."""
    depth = resize(head.depth(head(patch, cls, tuple(sizes["grid"]))), true.shape[2:])
    loss = sig_loss(depth, true) + GRADIENT_WEIGHT * gradient_loss(depth, true)
    names, parameters = zip(*head.named_parameters(), strict=True)
    return list(zip(names, torch.autograd.grad(loss, parameters), strict=True))
