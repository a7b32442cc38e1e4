"""The plain model of reconstruction's benchmark: public numbers, and the same steps as fastmum."""

import pytest
import torch
from public_files import error, files, part_of, sizes_of
from safetensors.torch import load_file

from benchmarks.reference.reconstruction import ReferenceVGGT, losses_of
from fastmum.tasks.reconstruction.convert import config_of, from_public

NAMES = {
    "loss_T": "translation", "loss_R": "rotation", "loss_FL": "fov", "loss_camera": "camera",
    "loss_conf_depth": "depth_confidence", "loss_reg_depth": "depth_error", "loss_grad_depth": "depth_gradient",
    "loss_conf_point": "points_confidence", "loss_reg_point": "points_error", "loss_grad_point": "points_gradient",
    "objective": "objective",
}  # fmt: skip


@pytest.mark.parametrize("file", files("vggt", "model.safetensors"))
def test_the_reference_has_the_public_numbers(file):
    tensors, sizes = load_file(file), sizes_of(file)
    kinds = {
        name: part_of(tensors, f"{name}/") for name in ("weights", "input", "output", "loss", "grad", "normalised")
    }
    config = config_of(
        kinds["weights"], sizes["patch"], taps=tuple(sizes["taps"]), camera_heads=sizes["camera_heads"],
        camera_iterations=sizes["iterations"],
    )  # fmt: skip
    about = {name: value for name, value in vars(config).items() if name != "points"}
    model = ReferenceVGGT(**about)
    model.load_state_dict(from_public(kinds["weights"])[0])
    inputs, truth = kinds["input"], kinds["normalised"]
    grid = inputs["images"].shape[-2] // sizes["patch"], inputs["images"].shape[-1] // sizes["patch"]
    tokens = inputs["encoder_tokens"].unflatten(0, (sizes["B"], sizes["S"]))
    outputs = model(tokens, grid)
    for found, name in zip(outputs[1:], ("depth", "depth_conf", "points", "points_conf"), strict=True):
        assert error(found, kinds["output"][name]) < 1e-4, name
    for i, cameras in enumerate(outputs.cameras):
        assert torch.allclose(cameras, kinds["output"][f"pose_enc_{i}"], rtol=1e-4, atol=1e-6)
    losses = losses_of(outputs, {"cameras": kinds["output"]["gt_pose_enc"], "depth": truth["depths"],
                                 "points": truth["world_points"], "mask": inputs["point_masks"]})  # fmt: skip
    for name, value in kinds["loss"].items():
        assert losses[NAMES[name]].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name
    losses["objective"].backward()
    for name, expected in kinds["grad"].items():
        tolerance = 1e-3 if name.startswith("point_head.") else 1e-4
        assert error(model.get_parameter(name).grad, expected) < tolerance, name
