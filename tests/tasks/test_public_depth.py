"""Numbers of DINOv2's and DINOv3's public code: the linear depth head, its losses and gradients, as files."""

import json
from pathlib import Path

import pytest
import torch
from public_files import files
from safetensors import safe_open
from safetensors.torch import load_file

from fastmum.tasks.depth import GRADIENT_WEIGHT, DepthHead, HeadKind, gradient_loss, resize, sig_loss


@pytest.mark.parametrize("file", files("depth", "head.safetensors"))
def test_public_depth_head(file: Path):
    tensors, sizes = load_file(file), json.loads(safe_open(file, "pt").metadata()["config"])
    B, blocks = sizes["B"], sizes["layers"]
    patch = torch.stack([tensors[f"input/map_{i}"].flatten(2).mT for i in range(blocks)], 1)
    with_cls = sizes["cls_concat"]
    cls = torch.stack([tensors[f"input/cls_{i}"] for i in range(blocks)], 1) if with_cls else None
    kind = HeadKind(cls=with_cls, upsample=sizes["upsample"])
    head = DepthHead(kind, sizes["dim"], blocks, sizes["max_depth"], "sig", sizes["bins"], sizes["min_depth"])
    state = {name.removeprefix("weights/"): x for name, x in tensors.items() if name.startswith("weights/")}
    head.load_state_dict(state | {"bins": head.bins})
    true, limit = tensors["input/gt"], sizes["max_depth"]
    low = head.depth(head(patch, cls, tuple(sizes["grid"])))
    depth = resize(low, true.shape[2:])
    assert depth.shape == (B, 1, *true.shape[2:])
    for found, name in ((low, "low"), (depth, "full"), (depth.clamp(sizes["min_depth"], limit), "full_clamped")):
        torch.testing.assert_close(found, tensors[f"output/depth_{name}"], rtol=1e-5, atol=1e-5)
    sig, gradient = sig_loss(depth, true, max_depth=limit), GRADIENT_WEIGHT * gradient_loss(depth, true, limit)
    expected = {
        "sig": sig, "sig_dinov3": sig, "gradlog_dinov3_x0.5": gradient,
        "sig_warm": (warm := sig_loss(depth, true, mean_only=True, max_depth=limit)), "sig_dinov3_warm": warm,
    }  # fmt: skip
    for name, found in expected.items():
        torch.testing.assert_close(found, tensors[f"loss/{name}"], rtol=1e-5, atol=1e-6)
    (sig + gradient).backward()
    gradients = {name: x.grad for name, x in head.named_parameters()}
    for name, found in gradients.items():
        reference = tensors[f"grad/{name}"]
        assert (found - reference).abs().max() <= 1e-4 * reference.abs().max(), name
