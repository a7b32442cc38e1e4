"""Numbers of VGGT's public code: outputs, losses and gradients of its model, as files."""

from typing import Any

import pytest
from public_files import error, files, part_of, sizes_of
from safetensors.torch import load_file
from torch import Tensor

from fastmum.tasks.reconstruction.aggregator import Sequences
from fastmum.tasks.reconstruction.camera import decode_cameras, encode_cameras
from fastmum.tasks.reconstruction.convert import config_of, from_public, to_public
from fastmum.tasks.reconstruction.losses import (
    LossWeights,
    Prediction,
    Scene,
    losses_of,
    normalise_scenes,
)
from fastmum.tasks.reconstruction.model import Reconstruction

LOSSES = {  # public name: ours
    "loss_T": "translation", "loss_R": "rotation", "loss_FL": "fov", "loss_camera": "camera",
    "loss_conf_depth": "depth_confidence", "loss_reg_depth": "depth_error", "loss_grad_depth": "depth_gradient",
    "loss_conf_point": "points_confidence", "loss_reg_point": "points_error", "loss_grad_point": "points_gradient",
    "objective": "objective",
}  # fmt: skip


def weights_of(sizes: dict[str, Any]) -> LossWeights:
    stated = sizes["loss"]
    return LossWeights(stated["camera"], stated["depth"], stated["point"])


def packed(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def check_losses(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(expected) <= set(LOSSES)
    for public, value in expected.items():
        assert found[LOSSES[public]].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), public


@pytest.mark.parametrize("file", files("vggt", "model.safetensors"))
def test_public_model_outputs_losses_and_gradients(file):
    tensors, sizes = load_file(file), sizes_of(file)
    public, inputs, outputs = (part_of(tensors, f"{kind}/") for kind in ("weights", "input", "output"))
    S = sizes["S"]
    config = config_of(
        public, sizes["patch"], taps=tuple(sizes["taps"]), camera_heads=sizes["camera_heads"],
        camera_iterations=sizes["iterations"],
    )  # fmt: skip
    stated = {
        "encoder_dim": "encoder_dim", "embed_dim": "embed_dim", "pairs": "depth", "num_heads": "heads",
        "registers": "registers", "dpt_features": "dpt_features", "camera_blocks": "camera_trunk",
    }  # fmt: skip
    assert {ours: sizes[name] for ours, name in stated.items()}.items() <= vars(config).items()
    assert list(config.dpt_levels) == sizes["dpt_out_channels"]
    model = Reconstruction(config)
    model.load_state_dict(from_public(public)[0])
    again = to_public(model.state_dict())
    assert {name: x.shape for name, x in again.items()} == {name: x.shape for name, x in public.items()}

    height, width = inputs["images"].shape[-2:]
    grid = height // config.patch_size, width // config.patch_size
    sequences = Sequences.of([S] * sizes["B"])
    pairs = model.aggregator(inputs["encoder_tokens"], grid, sequences, range(config.pairs))
    for i, pair in enumerate(pairs):
        assert error(pair.select(), packed(outputs[f"pair_{i}"])) < 1e-5
    prediction = model.predict(inputs["encoder_tokens"], grid, sequences)
    for i, cameras in enumerate(prediction.cameras):
        assert error(cameras, packed(outputs[f"pose_enc_{i}"])) < 1e-5
    for name, found in (
        ("depth", prediction.depth[..., None]), ("depth_conf", prediction.depth_confidence),
        ("points", prediction.points), ("points_conf", prediction.points_confidence),
    ):  # fmt: skip
        assert error(found, packed(outputs[name])) < 1e-4, name

    raw = "extrinsics", "depths", "world_points"
    names = "raw_extrinsics", "intrinsics", "raw_depths", "raw_world_points", "point_masks"
    scene = normalise_scenes(Scene(*(packed(inputs[name]) for name in names)), sequences)
    for name, found in zip(raw, (scene.camera_from_world, scene.depth, scene.points), strict=True):
        assert error(found, packed(tensors[f"normalised/{name}"])) < 1e-5, name
    assert (
        error(encode_cameras(scene.camera_from_world, scene.K, (height, width)), packed(outputs["gt_pose_enc"])) < 1e-5
    )
    last = outputs[f"pose_enc_{sizes['iterations'] - 1}"]  # a field of view near 0 is ill-conditioned
    T, K = decode_cameras(packed(last), (height, width))
    assert error(T[:, :3], packed(outputs["pred_extrinsics"])) < 1e-5
    assert error(K, packed(outputs["pred_intrinsics"])) < 1e-5

    losses = losses_of(prediction, scene, sequences, weights_of(sizes))
    check_losses(losses, part_of(tensors, "loss/"))
    losses["objective"].backward()
    for name, expected in part_of(tensors, "grad/").items():
        tolerance = 1e-3 if name.startswith("point_head.") else 1e-4
        assert error(model.get_parameter(name).grad, expected) < tolerance, name


@pytest.mark.parametrize("file", files("vggt", "losses.safetensors"))
def test_public_losses_and_their_gradients(file):
    tensors = load_file(file)
    cases = sorted({name.split("/")[0] for name in tensors})
    assert cases
    for case in cases:
        batch, pred = (part_of(tensors, f"{case}/{kind}/") for kind in ("batch", "pred"))
        B, S = batch["depths"].shape[:2]
        inputs = {name: packed(x).requires_grad_() for name, x in pred.items()}
        cameras = [inputs[f"pose_enc_{i}"] for i in range(sum(name.startswith("pose_enc_") for name in pred))]
        dense = inputs["depth"][..., 0], inputs["depth_conf"], inputs["world_points"], inputs["world_points_conf"]
        names = "extrinsics", "intrinsics", "depths", "world_points", "point_masks"
        scene = Scene(*(packed(batch[name]) for name in names))
        losses = losses_of(Prediction(cameras, *dense), scene, Sequences.of([S] * B), LossWeights())
        check_losses(losses, part_of(tensors, f"{case}/loss/"))
        losses["objective"].backward()
        for name, expected in part_of(tensors, f"{case}/grad/").items():
            assert error(inputs[name].grad, packed(expected)) < 1e-4, (case, name)
