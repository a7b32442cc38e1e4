"""Folders of transformers' DINOv3 models, read and written."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmum
from fastmum.export import export
from fastmum.pretrained import WeightsError


@pytest.fixture
def folder(tiny, save):
    """The encoder of `tiny`, with another epsilon than the default."""
    return export(save(tiny.state_dict()), "hf", norm_eps=1e-6).file


def test_there_and_back(folder, tiny):
    encoder = fastmum.load_pretrained(folder)
    assert encoder.config.norm_eps == 1e-6
    assert encoder.config.num_heads == tiny.config.num_heads
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, tiny.state_dict()[name]), name
    again = export(folder, "safetensors").file
    assert again == folder.with_name(f"{folder.name}.safetensors")
    assert dataclasses.asdict(fastmum.load_pretrained(again).config)["norm_eps"] == 1e-6


def test_layer_scale_and_absent_biases_of_others(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, layerscale_value=0.3,
        pos_embed_rescale=None,
    )  # fmt: skip
    theirs = transformers.DINOv3ViTModel(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "mask_token" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        ours = fastmum.load_pretrained(tmp_path / "theirs").forward_features(images)
        output = theirs(images)
    torch.testing.assert_close(ours["x_norm_patchtokens"], output.last_hidden_state[:, 1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours["x_norm_clstoken"], output.pooler_output, rtol=0, atol=1e-4)


def test_other_models_are_refused(folder):
    before = (folder / "config.json").read_text()
    for key, value in (("num_register_tokens", 4), ("use_gated_mlp", True), ("rope_theta", 10.0)):
        (folder / "config.json").write_text(json.dumps(json.loads(before) | {key: value}))
        with pytest.raises(WeightsError, match=f"{folder}.*{key} is {value}"):
            fastmum.load_pretrained(folder)
    (folder / "config.json").write_text(before)
    tensors = load_file(folder / "model.safetensors")
    for name, error in (("layer.1.norm2.bias", r"blocks.1.norm2.bias \[32\]"), ("embeddings.cls_token", "cls_token")):
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(WeightsError, match=error):
            fastmum.load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no model.safetensors"):
        fastmum.load_pretrained(folder)
