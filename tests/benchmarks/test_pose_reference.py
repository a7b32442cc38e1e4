"""The plain model of pose's benchmark: public numbers, and the same steps as fastmum."""

import json

import pytest
import torch
from public_files import files
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.offline.pose import pace, seconds, work
from benchmarks.pose import PoseComparison, main
from benchmarks.reference.pose import ReferenceReloc3r, pose_loss
from benchmarks.step import DisagreementError
from fastmum.model.config import PRESETS
from fastmum.tasks.pose.flops import frame_flops
from fastmum.tasks.pose.model import PoseConfig

TINY = [
    "model.encoder=random:mum_tiny", "model.embed_dim=64", "model.num_heads=2", "model.depth=2", "model.head_dim=32",
    "data.image_size=48", "model.compile=off", "train.precision=fp32",
]  # fmt: skip


@pytest.mark.parametrize("file", files("reloc3r", "model.safetensors"))
def test_the_reference_has_the_public_numbers(file):
    tensors, sizes = load_file(file), json.loads(safe_open(file, "pt").metadata()["config"])
    kinds = {kind: {n.removeprefix(f"{kind}/"): x for n, x in tensors.items() if n.startswith(f"{kind}/")}
             for kind in ("weights", "input", "output", "loss", "grad")}  # fmt: skip
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
        found = model.get_parameter(name).grad
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), name


@pytest.mark.slow
def test_losses_agree_or_nothing_is_timed():
    comparison = PoseComparison(2, TINY)
    try:
        comparison.check()
        comparison.run(rounds=1)
        assert {*comparison.rounds("step")} == {"reference", "fastmum"}
        comparison.contestants["reference"]()  # one step ahead
        with pytest.raises(DisagreementError, match="loss of step 1"):
            comparison.check()
    finally:
        comparison.close()


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
