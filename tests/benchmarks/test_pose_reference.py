"""The plain model of pose's benchmark: public numbers; operations."""

import pytest
import torch
from public_files import error, files, part_of, sizes_of
from safetensors.torch import load_file

from benchmarks.offline.pose import pace, seconds, work
from benchmarks.pose import main
from benchmarks.reference.pose import ReferenceReloc3r, pose_loss
from fastmum.model.config import PRESETS
from fastmum.tasks.pose.model import PoseConfig, frame_flops


@pytest.mark.parametrize("file", files("reloc3r", "model.safetensors"))
def test_the_reference_has_the_public_numbers(file):
    tensors, sizes = load_file(file), sizes_of(file)
    kinds = {name: part_of(tensors, f"{name}/") for name in ("weights", "input", "output", "loss", "grad")}
    width = len(kinds["weights"]["pose_head.proj.weight"])
    model = ReferenceReloc3r(sizes["encoder_dim"], width, sizes["dim"], sizes["depth"], sizes["heads"])
    model.load_state_dict(kinds["weights"])
    poses = model(kinds["input"]["encoder_tokens"], (sizes["H"] // sizes["patch"], sizes["W"] // sizes["patch"]))
    for i, (R, t) in enumerate(poses, 1):
        expected = kinds["output"][f"pose_{i}"]
        assert torch.allclose(R, expected[:, :3, :3], rtol=1e-5, atol=1e-5)
        assert torch.allclose(t, expected[:, :3, 3], rtol=1e-5, atol=1e-5)
    loss = pose_loss(poses, (kinds["input"]["camera_pose_1"], kinds["input"]["camera_pose_2"]))
    assert loss.item() == pytest.approx(kinds["loss"]["total"].item(), rel=1e-5)
    loss.backward()
    for name, expected in kinds["grad"].items():
        assert error(model.get_parameter(name).grad, expected) < 1e-4, name


def test_invalid_arguments(refusal):
    assert "--pairs is 0" in refusal(main, "--pairs=0")


def test_the_prediction_counts_what_the_task_counts():
    config, encoder = PoseConfig(depth=4), PRESETS["mum_vitb16"]
    done = work(config, encoder, 3)
    counted = 6 * frame_flops(config, (16, 16), encoder, 1, True)
    assert sum(done[:3]) == pytest.approx(counted)
    assert min(done) > 0
    for gpu in ("a100", "h200"):
        low, likely, high = seconds(done, gpu)
        assert 0 < low < likely < high
    assert pace(16, 1.0) == pytest.approx(86400 * 1024 / 225e6)
