"""DINOv3, MAE and CroCo v2: outputs and gradients of the public code from its own files, which load strictly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from public_files import files
from released import difference
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import fastmum
from fastmum.model.encoder import Encoder
from fastmum.model.options import position_table, sincos_table
from fastmum.pretrained import WeightsError
from fastmum.pretrained.croco import reorder

OUTPUTS, GRADIENTS = 5e-6, 2e-5  # norm of the difference over the norm, float32
NAMES = ("mae", "mae_timm", "mae_hf", "croco", "dinov3", "dinov3_hf", "dinov3_timm", "dinov3_timm_qkvb")
PARAMETERS = [
    pytest.param(name, *each.values, marks=each.marks, id=f"{name}-{each.id}")
    for name in NAMES for each in files("encoders", f"{name}.safetensors")
]  # fmt: skip


class Published:
    """A file of outputs: its tensors, its metadata, and the weights written as they are released."""

    def __init__(self, name: str, file: Path, folder: Path) -> None:
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
            self.tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dictionary)
        self.name, self.about = name, about
        self.config, self.sizes = json.loads(about["config"]), json.loads(about["sizes"])
        weights = self.part("weights/")
        decoder = json.loads(about["decoder_keys"]) if "decoder_keys" in about else []
        encoder = {key: tensor for key, tensor in weights.items() if key not in decoder}
        wrapped: dict[str, Any] = {"mae": {"model": encoder}, "dinov3": weights}
        if name == "croco":
            wrapped["croco"] = {"croco_kwargs": json.loads(about["croco_kwargs"]), "model": weights}
        self.kind, self.folder = name.partition("_")[0], folder
        self.path, self.whole = folder / "weights.pth", folder / "full.pth"
        if name.endswith("_hf"):
            self.path = folder
            (folder / "config.json").write_text(about["config_json"])
        if name in wrapped:
            torch.save(wrapped[name], self.path)
            torch.save({"model": weights, "epoch": 1}, self.whole)
        else:
            save_file(weights, folder / "model.safetensors")
            self.path = folder if name.endswith("_hf") else folder / "model.safetensors"
        # What the file does not state, and how the public code resizes its table.
        self.given: dict[str, Any] = {}
        if "timm" in name or name == "mae":
            self.given["num_heads"] = self.config["num_heads"]
        if "antialias" in about.get("position_resize", "").replace("no antialias", ""):
            self.given["table"] = "antialias"

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): x for key, x in self.tensors.items() if key.startswith(prefix)}

    def load(self, path: Path | None = None, **overrides: Any) -> Encoder:
        return fastmum.load_encoder(f"{self.kind}:{path or self.path}", **self.given | overrides)


@pytest.fixture
def published(request, tmp_path) -> Published:
    return Published(*request.param, tmp_path)


every = pytest.mark.parametrize(
    "published", [pytest.param(p.values, marks=p.marks, id=p.id) for p in PARAMETERS], indirect=True
)


def joined(tokens) -> Tensor:
    """All tokens in the order of the public code."""
    cls = [] if tokens.cls is None else [tokens.cls[:, None]]
    return torch.cat([*cls, *([] if tokens.registers is None else [tokens.registers]), tokens.patch], dim=1)


def assert_outputs(encoder: Encoder, published: Published) -> None:
    for size in published.sizes:
        expected = published.part(f"output/{size}/")
        for images in published.part(f"input/{size}/").values():  # uint8 and normalised
            with torch.no_grad():
                blocks = encoder.tokens(images, range(published.config["depth"]), norm=False)
                (last,) = encoder.tokens(images, norm=True)
                features = encoder.forward_features(images)
                (first,) = encoder.tokens(images, [0], norm=True)
            found = {f"block_{i}": joined(each) for i, each in enumerate(blocks)}
            found |= {"patch_prenorm": blocks[-1].patch, "patch_norm": last.patch}
            found |= {"cls_norm": last.cls, "registers_norm": last.registers}
            found |= {"intermediate_0_norm_map": first.maps(), "intermediate_0_norm_cls": first.cls}
            for key, value in expected.items():
                assert difference(found[key], value) < OUTPUTS, (size, key)
            assert torch.equal(features["x_norm_patchtokens"], last.patch)
            assert (last.cls is None) == ("cls_norm" not in expected)
            assert (last.registers is None) == ("registers_norm" not in expected)


@every
def test_outputs_frozen_and_trainable(published):
    encoder = published.load()
    assert encoder.config.norm_eps == published.config["norm_eps"]
    assert encoder.config.num_heads == published.config["num_heads"]
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert_outputs(encoder, published)
    assert_outputs(published.load(trainable=True), published)
    if published.name == "mae" and "decoder_keys" in published.about:  # the file with decoder
        whole = published.load(published.whole)
        assert all(torch.equal(x, whole.state_dict()[name]) for name, x in encoder.state_dict().items())


@every
def test_gradients(published):
    gradients = published.part("grad/")
    sizes = {key.partition("/")[0] for key in gradients}
    for size in sizes:
        encoder = published.load(trainable=True)
        features = encoder.forward_features(published.tensors[f"input/{size}/pixels"])["x_norm_patchtokens"]
        (features * gradients[f"{size}/cotangent"]).sum().backward()
        found = {name: parameter.grad for name, parameter in encoder.named_parameters()}
        names = {"enc_": "", "storage_tokens": "register_tokens", "reg_token": "register_tokens"}
        names |= {"ls1.gamma": "attn.proj.scale", "ls2.gamma": "mlp.fc2.scale"}
        for name, expected in published.part(f"grad/{size}/").items():
            ours = name
            for theirs, our in names.items():
                ours = ours.replace(theirs, our)
            if name != "cotangent":
                gradient = found[ours]
                if published.kind == "croco" and "attn.qkv" in name:
                    gradient = reorder(gradient, encoder.config.num_heads)
                assert difference(gradient.reshape(expected.shape), expected) < GRADIENTS, name


@every
def test_tables_of_positions(published):
    weights = published.part("weights/")
    for size, (height, width) in published.sizes.items():
        grid = height // published.config["patch_size"], width // published.config["patch_size"]
        if (expected := published.tensors.get(f"pos_embed/{size}")) is not None:
            table, resize = weights["pos_embed"], published.given.get("table", "bicubic")
            side = round((table.shape[1] - 1) ** 0.5)
            assert difference(position_table(table, (side, side), grid, resize), expected) < OUTPUTS
        if (expected := published.tensors.get(f"sincos/{size}")) is not None:
            assert (sincos_table(*grid, expected.shape[1])[0] - expected).abs().max() < 1e-6
            with torch.no_grad():  # "sincos" does not read the stored table
                encoder, images = published.load(table="sincos"), published.tensors[f"input/{size}/pixels"]
                before = encoder(images)
                encoder.pos_embed.zero_()
                assert torch.equal(encoder(images), before)
        for i, name in enumerate(("sin", "cos")):
            if (expected := published.tensors.get(f"rope/{size}/{name}")) is not None:
                assert difference(published.load().rope_embed.tables(*grid)[i], expected) < OUTPUTS


@every
def test_every_tensor_is_needed_and_used(published):
    """Without a tensor of the encoder, with another one, or with one of another shape, nothing is loaded."""
    weights, decoders = published.part("weights/"), ("dec", "prediction_head", "mask_token", "embeddings.mask_token")
    used = [name for name in weights if not name.startswith(decoders) and "bias_mask" not in name]
    last = f"{published.config['depth'] - 1}"
    unstated = ("storage_tokens", "reg_token", "rope_embed.periods")  # their number is nowhere else
    for name in used:
        if any(part.isdigit() and part != last for part in name.split(".")) or name in unstated:
            continue  # one block is enough

        def save(state):
            if published.name == "croco":
                state = {"croco_kwargs": json.loads(published.about["croco_kwargs"]), "model": state}
            if published.path.suffix == ".pth":
                torch.save(state, published.path)
            else:
                save_file(state, published.folder / "model.safetensors")

        for state in (
            {key: x for key, x in weights.items() if key != name},
            weights | {f"{name.rpartition('.')[0] or name}.more": torch.zeros(3)},
            weights | {name: torch.cat([weights[name], weights[name]], dim=-1)},
        ):
            save(state)
            with pytest.raises(WeightsError) as caught:
                published.load(trainable=True)
            assert "\n" not in str(caught.value)
