"""The released files by their shapes, and tiny instances of the released model by its outputs."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import fastmum
from fastmum.model.encoder import Encoder
from fastmum.model.mum import MuM
from fastmum.pretrained import read_pretrained


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def features(model, images):
    with torch.no_grad():
        return model.forward_features(images)["x_norm_patchtokens"]


def test_features_of_the_released_model(reference, save):
    model = fastmum.load_pretrained(save(reference.state), norm_eps=reference.norm_eps)
    assert type(model) is MuM
    assert not model.training
    sizes = {name: value for name, value in vars(model.config).items() if name in reference.config}
    assert sizes == {name: reference.config[name] for name in sizes}
    assert difference(features(model, reference.images), reference.tensors["features.patch"]) < 1e-5
    output = model(
        reference.images, [reference.config["S"]] * reference.config["B"], reference.config["mask_ratio"],
        reference.tensors["mask_noise"],
    )  # fmt: skip
    assert output.loss.item() == pytest.approx(reference.tensors["loss"].item(), rel=1e-5)  # heads are right


@pytest.mark.parametrize(
    ("name", "encoder_only", "rope"),
    [("MuM_ViTLarge_BaseDecoder.pth", False, torch.float32), ("MuM_ViTLarge.pth", True, torch.bfloat16)],
)
def test_the_released_files_by_their_shapes(shared, save, name, encoder_only, rope):
    shapes = json.loads((shared / "parity/official_state_dict_shapes.json").read_text())[name]
    like = {
        key: torch.zeros(1, dtype=getattr(torch, dtype.removeprefix("torch."))).expand(shape)
        for key, (shape, dtype) in (
            (key, value if encoder_only else (value, "torch.float32")) for key, value in shapes.items()
        )
    }
    pretrained = read_pretrained(save(like))
    assert pretrained.config == fastmum.PRESETS["mum_vitl16_released"]
    assert (pretrained.encoder_only, pretrained.rope_dtype) == (encoder_only, rope)
    assert "mum_vitl16_released" in pretrained.title


@pytest.fixture
def encoder_file(reference, save):
    """The reference's encoder as in the released encoder-only file, with bfloat16 periods."""
    state = {name: t for name, t in reference.state.items() if not name.startswith(("decoder", "mask", "rope_embed_d"))}
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    return save(state)


def released_encoder(state, images, heads, eps):
    """The released encoder in plain code: tables, q and k in bfloat16, everything else in float32."""
    bf16 = torch.bfloat16
    width = state["cls_token"].shape[2]
    rows, columns = images.shape[2] // 16, images.shape[3] // 16
    y, x = (2.0 * (torch.arange(0.5, n, dtype=bf16) / n) - 1.0 for n in (rows, columns))
    place = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)
    angles = (2 * math.pi * place[:, :, None] / state["rope_embed.periods"].to(bf16)).flatten(1).tile(2)

    def turn(x):
        x = x.to(bf16)
        cls, x = x[:, :, :1], x[:, :, 1:]
        first, second = x.chunk(2, -1)
        x = x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
        return torch.cat([cls, x], 2).float()

    def norm(x, name):
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        at = f"blocks.{i}"
        qkv = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(turn(qkv[0]), turn(qkv[1]), qkv[2])
        x = x + linear(attended.transpose(1, 2).flatten(2), f"{at}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
    return norm(x, "norm")[:, 1:]


def test_the_encoder_only_file_has_positions_in_bfloat16(reference, encoder_file):
    heads = reference.config["num_heads"]
    theirs = released_encoder(reference.state, reference.images, heads, 1e-5)
    model = fastmum.load_pretrained(encoder_file)
    assert type(model) is Encoder
    assert model.rope_embed.periods.dtype == torch.bfloat16
    assert difference(features(model, reference.images), theirs) < 2e-6
    exact = fastmum.load_pretrained(encoder_file, rope_dtype="float32")
    assert difference(features(exact, reference.images), theirs) > 1e-5


def test_positions_in_either_precision_from_either_file(reference, encoder_file, save):
    whole = save(reference.state, "whole")
    for rope in ("float32", torch.bfloat16):
        ours, theirs = (
            features(fastmum.load_pretrained(file, rope_dtype=rope, encoder_only=True), reference.images)
            for file in (whole, encoder_file)
        )
        assert torch.equal(ours, theirs)
    exact = fastmum.load_pretrained(encoder_file, rope_dtype="float32", norm_eps=reference.norm_eps)
    assert difference(features(exact, reference.images), reference.tensors["features.patch"]) < 1e-5


def test_bfloat16_positions_have_gradients_and_intermediate_layers(reference, encoder_file):
    model = fastmum.load_pretrained(encoder_file)
    (maps,) = model.get_intermediate_layers(reference.images, n=1, reshape=True)
    maps.square().mean().backward()
    gradient = model.blocks[0].attn.qkv.weight.grad
    exact = fastmum.load_pretrained(encoder_file, rope_dtype="float32")
    exact.get_intermediate_layers(reference.images, n=1)[0].square().mean().backward()
    assert 0 < difference(gradient, exact.blocks[0].attn.qkv.weight.grad) < 0.02


def test_parameters_in_bfloat16_keep_positions_in_float32(reference, save):
    model = fastmum.load_pretrained(save(reference.state), dtype="bfloat16", norm_eps=reference.norm_eps)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert difference(features(model, reference.images).float(), reference.tensors["features.patch"]) < 0.02
