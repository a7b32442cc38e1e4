"""Numbers of Reloc3r's public code: outputs, loss and gradients of decoder and head, as files."""

import math
from pathlib import Path

import pytest
import torch
from public_files import error, files, part_of, sizes_of
from safetensors.torch import load_file
from torch import Tensor

from fastmum.tasks.pose.convert import config_of, from_public, to_public
from fastmum.tasks.pose.losses import pose_errors, true_poses
from fastmum.tasks.pose.model import RelativePose


def interleaved(first: Tensor, second: Tensor) -> Tensor:
    """Frames pair by pair from those of view 1 and of view 2."""
    return torch.stack([first, second], 1).flatten(0, 1)


@pytest.mark.parametrize("file", files("reloc3r", "model.safetensors"))
def test_public_model_outputs_loss_and_gradients(file: Path):
    tensors, sizes = load_file(file), sizes_of(file)
    public = part_of(tensors, "weights/")
    config = config_of(public, sizes["heads"])
    stated = {"encoder_dim": "encoder_dim", "patch_size": "patch", "embed_dim": "dim", "depth": "depth"}
    assert {ours: sizes[name] for ours, name in stated.items()}.items() <= vars(config).items()
    model = RelativePose(config)
    rope = {"decoder.rope.periods": sizes["rope_base"] ** (
        2 * torch.arange(len(model.decoder.rope.periods)) / (2 * len(model.decoder.rope.periods)))}  # fmt: skip
    model.load_state_dict(from_public(public, config) | rope)
    again = to_public(model.state_dict(), config)
    assert again.keys() == public.keys()
    assert all(torch.equal(again[name], public[name]) for name in public)

    tokens = interleaved(*tensors["input/encoder_tokens"].chunk(2))
    grid = sizes["H"] // sizes["patch"], sizes["W"] // sizes["patch"]
    kept = []
    model.decoder.blocks[0].register_forward_hook(lambda module, args, output: kept.append(output[0]))
    decoded = model.decoder(tokens, grid)
    first = kept[0].unflatten(0, decoded.shape[:2])
    t, rows = model.head(decoded)
    found = model.predict(tokens, grid)
    assert error(first[::2], tensors["output/block0_view1"]) < 1e-5
    for i in (0, 1):
        name = f"_{i + 1}"
        assert error(decoded[i::2], tensors[f"output/decoder{name}"]) < 1e-5
        assert error(t[i::2], tensors[f"output/raw_t{name}"]) < 1e-5
        assert error(rows[i::2], tensors[f"output/raw_rot9{name}"]) < 1e-5
        pose = tensors[f"output/pose{name}"]
        assert error(found.R[i::2], pose[:, :3, :3]) < 1e-5
        assert error(found.t[i::2], pose[:, :3, 3]) < 1e-5

    world_from_camera = interleaved(*(tensors[f"input/camera_pose_{i}"] for i in (1, 2)))
    rotation, direction = pose_errors(found, true_poses(torch.linalg.inv(world_from_camera)))
    for i in (0, 1):
        for name, angles in (("rerr", rotation), ("terr", direction)):
            (key,) = [key for key in tensors if key.startswith("loss/") and key.endswith(f"_{name}{i + 1}")]
            assert math.degrees(angles[i::2].detach().mean()) == pytest.approx(tensors[key].item(), rel=1e-5)
    loss = (rotation + direction).sum() / sizes["B"]
    assert loss.detach().item() == pytest.approx(tensors["loss/total"].item(), rel=1e-5)
    loss.backward()
    gradients = to_public({name: p.grad for name, p in model.named_parameters()}, config)
    expected = part_of(tensors, "grad/")
    assert expected
    for name, value in expected.items():
        assert error(gradients[name], value) < 1e-4, name
