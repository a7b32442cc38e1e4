"""Encoders of other kinds on small weights of ours: frozen and trainable, compiled, images, specs, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from released import difference
from safetensors.torch import save_file
from torch import Tensor

import fastmum
from fastmum.features import read_features
from fastmum.features.__main__ import main as features_main
from fastmum.model.compile import compile_model
from fastmum.model.config import ModelConfig
from fastmum.model.encoder import Encoder
from fastmum.model.options import EncoderOptions, normalise
from fastmum.pretrained import MismatchError, WeightsError

CONFIG = ModelConfig(32, 2, 2, 32, 2, 2)
DINOV3 = EncoderOptions(registers=2, layer_scale=True, masked_bias=True)
THEIRS = {"register_tokens": "storage_tokens", "attn.proj.scale": "ls1.gamma", "mlp.fc2.scale": "ls2.gamma"}
IMAGES = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def state() -> dict[str, Tensor]:
    """A small DINOv3 under the released names, with LayerScale near 0.5 and no bias of k."""
    torch.manual_seed(0)
    found = {}
    for name, tensor in Encoder(CONFIG, DINOV3).state_dict().items():
        ours = name
        for our, theirs in THEIRS.items():
            name = name.replace(our, theirs)
        if "periods" in name:
            found[name] = tensor.bfloat16()
        elif name.endswith("bias_mask"):
            found[name] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32)
        else:
            around = 0.5 if ours.endswith("scale") else 1.0 if "norm" in name and name.endswith("weight") else 0.0
            found[name] = around + 0.1 * torch.randn_like(tensor)
    return found | {"mask_token": torch.zeros(1, 32)}


@pytest.fixture
def save(tmp_path):
    def write(content, name="file.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def test_a_frozen_encoder_saves_nothing_and_a_trainable_one_is_exact(state, save):
    """LayerScale and masks are parameters and buffers for training, and part of the weights otherwise."""
    spec = f"dinov3:{save({'teacher': {f'backbone.{name}': x for name, x in state.items()}})}"
    frozen, trained = fastmum.load_encoder(spec), fastmum.load_encoder(spec, trainable=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x), lambda x: x):
        (output,) = frozen.tokens(IMAGES, norm=True)
    assert not output.patch.requires_grad
    assert saved == []
    assert frozen.state_dict().keys() == Encoder(CONFIG, EncoderOptions(registers=2)).state_dict().keys()
    torch.testing.assert_close(trained.tokens(IMAGES, norm=True)[0].patch, output.patch)
    optimizer, scale = torch.optim.AdamW(trained.parameters(), 1e-2), trained.blocks[0].attn.proj.scale
    before = scale.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        trained.tokens(IMAGES, norm=True)[0].patch.square().mul(torch.arange(32)).sum().backward()
        optimizer.step()
    assert (scale - before).abs().min() > 1e-3
    for block in trained.blocks:
        masked = block.attn.qkv.bias_mask == 0
        assert masked.sum() == 32
        assert not block.attn.qkv.used()[1][masked].any()


def test_blocks_compile_and_run_in_bfloat16(state, save):
    spec = f"dinov3:{save(state)}"
    plain, compiled = (fastmum.load_encoder(spec, trainable=True) for _ in range(2))
    assert compile_model(compiled, "block", steps=1, backend="aot_eager") == "block"
    for encoder in (plain, compiled):
        encoder.tokens(IMAGES, [0, 1], norm=True)[1].patch.square().mul(torch.arange(32)).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert difference(a.grad, b.grad) < 1e-5, name
    half = fastmum.load_encoder(spec, dtype="bfloat16")
    assert half.rope_embed.periods.dtype == torch.float32
    with torch.no_grad():
        exact, found = plain(IMAGES), half(IMAGES)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = plain(IMAGES)
    assert difference(found.float(), exact) < 0.05
    assert difference(mixed.float(), exact) < 0.05


def test_blocks_layers_and_images_of_several_sizes(state, save):
    encoder = fastmum.load_encoder(f"dinov3:{save(state)}")
    both = encoder.tokens(IMAGES, [1, 0], norm=True)
    for tokens, blocks in zip(both, ([-1], [0]), strict=True):
        (alone,) = encoder.tokens(IMAGES, blocks, norm=True)
        for one, other in zip(tokens[:3], alone[:3], strict=True):
            torch.testing.assert_close(one, other)
    (maps,) = encoder.get_intermediate_layers(IMAGES, reshape=True)
    assert torch.equal(maps, both[0].maps())
    images = [IMAGES[0], IMAGES[0].transpose(0, 1), IMAGES[1]]
    for image, (tokens,) in zip(images, encoder.tokens_of(images, [0], norm=False), strict=True):
        (alone,) = encoder.tokens(image[None], [0], norm=False)
        torch.testing.assert_close(tokens.patch, alone.patch)
        assert tokens.grid == alone.grid
    with pytest.raises(ValueError, match=r"blocks are \[2\]"):
        encoder.tokens(IMAGES, [2], norm=False)


def test_rescaled_coordinates_only_in_train_mode(state, save):
    spec = f"dinov3:{save(state)}"
    encoder, plain = fastmum.load_encoder(spec, rope_rescale=2), fastmum.load_encoder(spec)
    assert encoder.about["rope_rescale"] == 2
    assert torch.equal(encoder(IMAGES), plain(IMAGES))
    assert torch.equal(plain.train()(IMAGES), plain.eval()(IMAGES))
    torch.manual_seed(0)
    first, second = encoder.train()(IMAGES), encoder(IMAGES)
    assert difference(first, second) > 1e-4
    torch.manual_seed(0)
    assert torch.equal(encoder(IMAGES), first)


def test_normalisation_of_images(state, save, tmp_path):
    half, sat = ((0.5,) * 3, (0.5,) * 3), ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
    file = save(state | {"local_cls_norm.weight": torch.ones(32)})
    assert fastmum.load_encoder(f"dinov3:{file}").mean == sat[0]
    encoder = fastmum.load_encoder(f"dinov3:{file}", normalisation="half")
    assert (encoder.mean, encoder.std) == half
    assert (encoder.about["mean"], encoder.about["spec"]) == ([0.5] * 3, f"dinov3:{file}")
    images = normalise(IMAGES.permute(0, 3, 1, 2) / 255, *half)
    torch.testing.assert_close(encoder(IMAGES), encoder(images), rtol=1e-4, atol=1e-5)
    folder = tmp_path / "folder"  # timm's, which states it
    folder.mkdir()
    plain = {name: x for name, x in Encoder(CONFIG).state_dict().items() if "periods" not in name}
    save_file(plain, folder / "model.safetensors")
    config: dict[str, Any] = {"architecture": "vit_small_patch16_dinov3_qkvb", "model_args": {"num_heads": 2}}
    config["pretrained_cfg"] = dict(zip(("mean", "std"), sat, strict=True))
    (folder / "config.json").write_text(json.dumps(config))
    encoder = fastmum.load_encoder(f"timm:{folder}")
    assert (encoder.mean, encoder.std, encoder.num_heads) == (*sat, 2)


def croco_state() -> dict[str, Tensor]:
    """A small CroCo's encoder under the released names."""
    found = {}
    for name, tensor in Encoder(CONFIG, EncoderOptions(cls=False)).state_dict().items():
        found[f"enc_{name}" if name.startswith(("blocks.", "norm.")) else name] = tensor
    return {name: x for name, x in found.items() if "periods" not in name}


def test_an_encoder_without_cls_in_features_and_dust3r(save, tmp_path):
    plain = croco_state()
    wrapped = {"croco_kwargs": {"enc_num_heads": 2, "pos_embed": "RoPE100"}, "model": plain}
    encoder = fastmum.load_encoder(f"croco:{save(wrapped)}")
    assert encoder(IMAGES) is None
    dropped = dict.fromkeys(("dec_blocks2.0.norm1.weight", "downstream_head1.proj.bias"), torch.ones(3))
    dust3r = save({"model": plain | dropped}, "dust3r.pth")
    assert fastmum.load_encoder(f"croco:{dust3r}", num_heads=2).mean == (0.5,) * 3
    (tmp_path / "images").mkdir()
    Image.fromarray(np.asarray(IMAGES[0])).save(tmp_path / "images/a.png")
    words = [tmp_path / "images", "--weights", f"croco:{tmp_path / 'file.pth'}", "--out", tmp_path / "f.npz"]
    assert features_main([*map(str, words)]) == 0
    features, about = read_features(tmp_path / "f.npz")
    assert features["a.png"].cls is None
    torch.testing.assert_close(features["a.png"].patch, encoder.tokens(IMAGES[:1], norm=True)[0].patch[0])
    assert about["encoder"] == encoder.about


VIT = {f"blocks.0.{name}": torch.zeros(3) for name in ("attn.qkv.weight", "norm1.weight")}
VIT |= {name: torch.zeros(1, 1, 4) for name in ("cls_token", "norm.weight", "patch_embed.proj.weight")}
TABLE = VIT | {"pos_embed": torch.zeros(1, 1 + 6, 4)}
DINOV2 = TABLE | {"blocks.0.ls1.gamma": torch.zeros(3)}


def test_what_is_refused(state, save):
    """In one line, which names the file and what it is."""
    cases: list[tuple[str, Any, str]] = [
        ("mae", DINOV2, "DINOv2"),
        ("dinov3", DINOV2, "DINOv2"),
        ("dinov3", state | {"blocks.0.mlp.w1.weight": torch.zeros(3)}, "SwiGLU"),
        ("dinov3", state | {"blocks.1.attn.qkv.bias_mask": torch.full((96,), torch.nan)}, "bias_mask"),
        ("dinov3", {"downsample_layers.0.0.weight": torch.zeros(3)}, "ConvNeXt"),
        ("mae", TABLE | {"fc_norm.weight": torch.zeros(3)}, "fc_norm"),
        ("mae", TABLE, "pos_embed"),
        ("mae", state, "write dinov3:PATH"),
        ("dinov3", TABLE, "write mae:PATH"),
        ("dinov3", Encoder(CONFIG).state_dict(), "is a MuM"),
        ("", state, "write dinov3:"),
        ("", TABLE, "write mae:"),
        ("", croco_state(), "write croco:"),
        ("croco", {"model": croco_state() | {"enc_pos_embed": torch.zeros(4, 4)}}, "CroCo v1"),
        ("croco", {"croco_kwargs": {"pos_embed": "cosine"}, "model": croco_state()}, "'cosine'"),
        ("timm", VIT | {"blocks.0.attn.q_norm.weight": torch.zeros(3)}, "normalises queries"),
    ]
    for kind, content, words in cases:
        file = save(content)
        with pytest.raises(WeightsError) as caught:
            fastmum.load_encoder(f"{kind}:{file}" if kind else file)
        assert words in str(caught.value)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_specs_and_overrides_that_are_refused(state, save, tmp_path):
    file = save(state)
    for spec, overrides, words in (
        (f"dinov3:{file}", {"table": "sincos"}, "'table'"),
        (f"dinov3:{file}", {"rope_rescale": "wide"}, "rope_rescale"),
        (f"dinov3:{file}", {"normalisation": "none"}, "sat493m"),
        (f"dinov3:{file}", {"encoder_only": False}, "decoder"),
        (f"dinov3:{tmp_path / 'nothing'}", {}, "does not exist"),
        ("random:mum_huge", {}, "mum_huge"), ("random:mum_tiny", {"key": "teacher"}, "'key'"),
        ("timm:vit_base_patch14_dinov2", {}, "timm's vit_base_patch14_dinov2"),
    ):  # fmt: skip
        with pytest.raises(WeightsError) as caught:
            fastmum.load_encoder(spec, **overrides)
        assert words in str(caught.value)
    plain = {name: x for name, x in Encoder(CONFIG).state_dict().items() if "periods" not in name}
    save_file(plain, tmp_path / "model.safetensors")
    for config, words in (
        ({"model_type": "dinov2"}, "dinov2"), ({"architecture": "vit_small_plus_patch16_dinov3"}, "plus"),
        ({"model_type": "dinov3_vit", "use_gated_mlp": True}, "use_gated_mlp"),
        ({"model_type": "dinov3_vit", "num_register_tokens": 4}, "num_register_tokens is 4"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match=words):
            fastmum.load_encoder(f"dinov3:{tmp_path}")


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3.lvd1689m", "vit_small_patch16_224.dino"])
def test_names_of_timm(name, tmp_path, monkeypatch):
    timm, constants = pytest.importorskip("timm"), pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="not in the local cache"):
        fastmum.load_encoder(f"timm:{name}")
    with pytest.raises(WeightsError, match="has no weights"):
        fastmum.load_encoder(f"timm:{name}_other")
    theirs = timm.create_model(name, depth=2, dynamic_img_size=True).eval()
    repository = tmp_path / f"models--timm--{name}"
    for folder in ("refs", "snapshots/1"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text("1")
    save_file(theirs.state_dict(), repository / "snapshots/1/model.safetensors")
    encoder, images = fastmum.load_encoder(f"timm:{name}"), torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        (ours,) = encoder.tokens(images, norm=True)
        assert difference(ours.patch, theirs.forward_features(images)[:, encoder.options.prefix :]) < 5e-6


def test_several_models_in_a_file(state, save):
    both = {name: {f"backbone.{k}": x + i for k, x in state.items()} for i, name in enumerate(("student", "teacher"))}
    file = save(both)
    with pytest.raises(WeightsError, match=r"'student\.backbone', 'teacher\.backbone'"):
        fastmum.load_encoder(f"dinov3:{file}")
    encoder = fastmum.load_encoder(f"dinov3:{file}", key="teacher")
    assert torch.equal(encoder.cls_token, state["cls_token"] + 1)
    del both["student"]["backbone.norm.bias"]
    with pytest.raises(MismatchError, match=r"norm\.bias"):
        fastmum.load_encoder(f"dinov3:{save(both)}", key="student")


def test_random_encoders_and_those_of_fastmum(tiny, save):
    encoder = fastmum.load_encoder("random:mum_tiny", seed=3)
    torch.manual_seed(3)
    whole = fastmum.MuM(fastmum.PRESETS["mum_tiny"])
    assert torch.equal(encoder(IMAGES), whole.forward_features(IMAGES)["x_norm_clstoken"])
    file = save(tiny.state_dict())
    own = fastmum.load_encoder(file)
    assert type(own) is Encoder
    assert own.about == {
        "name": "file", "spec": str(file), "kind": "mum", "mean": list(own.mean), "std": list(own.std),
        "norm_eps": 1e-5, "num_heads": 2, "patch_size": encoder.config.patch_size,
    }  # fmt: skip
