"""Against numbers of the authors' released model: every output and every gradient."""

import json
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fastmum import PRESETS, ModelConfig, MuM

TOLERANCE = 1e-5  # norm of the difference over the norm, float32


class Fixture(NamedTuple):
    config: dict
    tensors: dict[str, Tensor]
    model: MuM

    @property
    def images(self) -> Tensor:
        return self.tensors["images"].flatten(0, 1)


@pytest.fixture(params=["reference_square", "reference_wide"])
def fixture(request, shared) -> Fixture:
    with safe_open(shared / "parity" / f"{request.param}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    sizes = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    eps = 1e-5 if config["norm_layer"] == "layernormbf16" else 1e-6
    model = MuM(ModelConfig(**{name: config[name] for name in sizes}, norm_eps=eps))
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    for name, buffer in model.named_buffers():  # what we compute is what the released model stores
        assert difference(buffer, state[name]) < 1e-7, name
    model.load_state_dict(state)
    return Fixture(config, tensors, model)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_training_pass_and_every_gradient(fixture):
    config, tensors, model = fixture
    output = model(fixture.images, [config["S"]] * config["B"], config["mask_ratio"], tensors["mask_noise"])
    output.loss.backward()
    assert difference(output.loss, tensors["loss"][0]) < TOLERANCE
    assert torch.equal(torch.zeros_like(tensors["mask"]).scatter(1, output.masked_ids, 1.0), tensors["mask"])
    theirs = tensors["pred"].gather(1, output.masked_ids[:, :, None].expand_as(output.pred))
    assert difference(output.pred, theirs) < TOLERANCE
    for name, parameter in model.named_parameters():
        assert difference(parameter.grad, tensors[f"grad.{name}"]) < TOLERANCE, name


def test_features_and_intermediate_layers(fixture):
    features = fixture.model.forward_features(fixture.images)
    assert difference(features["x_norm_patchtokens"], fixture.tensors["features.patch"]) < TOLERANCE
    assert difference(features["x_norm_clstoken"], fixture.tensors["features.cls"]) < TOLERANCE
    assert torch.equal(fixture.model.norm(features["x_prenorm"])[:, 0], features["x_norm_clstoken"])
    maps = fixture.model.get_intermediate_layers(fixture.images, n=2, reshape=True)
    for i, ours in enumerate(maps):
        assert difference(ours, fixture.tensors[f"intermediate.{i}"]) < TOLERANCE


def test_state_dict_is_the_released_checkpoints(shared):
    shapes = json.loads((shared / "parity/official_state_dict_shapes.json").read_text())
    with torch.device("meta"):
        model = MuM(PRESETS["mum_vitl16_released"])
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert ours == shapes["MuM_ViTLarge_BaseDecoder.pth"]
