"""Which files load, how they are detected, one-line errors for the others, and the outputs of the released model."""

import argparse
import dataclasses
import json
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmum import PRESETS, ModelConfig, load_pretrained
from fastmum.engine.checkpoint import Checkpoints
from fastmum.model.encoder import Encoder
from fastmum.model.mum import MuM
from fastmum.pretrained import MismatchError, WeightsError, read_pretrained


@pytest.fixture
def save(tmp_path):
    """Write something by torch.save to a file whose name says nothing."""

    def write(content, name="file.bin"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def assert_same(model, tiny, of=MuM):
    assert type(model) is of
    assert not model.training
    wanted = tiny.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), wanted[name]), name
    assert model.patch_embed.proj.weight.stride() == tiny.patch_embed.proj.weight.stride()  # as the kernels want it


def test_runs(tmp_path, tiny):
    state = {f"model.{name}": parameter.detach() for name, parameter in tiny.named_parameters()}
    writer, values = Checkpoints(tmp_path / "checkpoints", keep=2), {"model_config": dataclasses.asdict(tiny.config)}
    writer.save(7, state, values)
    writer.wait()
    for where in ("", "checkpoints", "checkpoints/step_0000007"):
        assert_same(load_pretrained(tmp_path / where), tiny)
        assert read_pretrained(str(tmp_path / where)).step == 7
    del state["model.norm.weight"]
    writer.save(8, state, values)
    writer.close()
    with pytest.raises(MismatchError, match=r"norm.weight \[32\]$"):
        load_pretrained(tmp_path)


def test_wrappers(tiny, save, caplog):
    s = tiny.state_dict()
    for wrapped in (
        {f"module.{k}": v for k, v in s.items()},
        {f"_orig_mod.{k}": v for k, v in s.items()},
        {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()},
        {"model": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        {"state_dict": {f"model.{k}": v for k, v in s.items()}, "loss": torch.zeros(2)},
        {"teacher": {f"module.backbone.{k}": v for k, v in s.items()}, "optimizer": {"state": {}}},
        {k: torch.nn.Parameter(v) for k, v in s.items()},
    ):
        assert_same(load_pretrained(save(wrapped)), tiny)
    state = {f"backbone.{k}": v for k, v in tiny.state_dict().items()} | {"dino_head.weight": torch.zeros(3)}
    assert_same(load_pretrained(save({"teacher": state})), tiny)
    assert "'teacher.backbone'" in caplog.text
    assert "dino_head.weight" in caplog.text


def test_of_several_models_one_must_be_chosen(tiny, save):
    other = {name: tensor + 1 for name, tensor in tiny.state_dict().items()}
    file = save({"student": {f"backbone.{k}": v for k, v in other.items()}, "teacher": tiny.state_dict()})
    with pytest.raises(WeightsError, match=r"'student.backbone', 'teacher'"):
        load_pretrained(file)
    for key in ("teacher", "student"):
        model = load_pretrained(file, key=key)
        assert torch.equal(model.norm.bias, (tiny if key == "teacher" else model).norm.bias)
    assert torch.equal(model.norm.bias, other["norm.bias"])
    with pytest.raises(WeightsError, match=r"key='ema'.* 'student.backbone', 'teacher'"):
        load_pretrained(file, key="ema")


def test_encoder_only(tiny, save):
    file = save(tiny.state_dict())
    encoder = load_pretrained(file, encoder_only=True)
    assert_same(encoder, tiny, Encoder)
    alone = save(encoder.state_dict(), "alone")
    assert_same(load_pretrained(alone), tiny, Encoder)
    with pytest.raises(WeightsError, match="encoder_only is False"):
        load_pretrained(alone, encoder_only=False)


def test_heads_given_against_the_periods(tiny, save):
    model = load_pretrained(save(tiny.state_dict()), num_heads=4, decoder_num_heads=1)
    fresh = MuM(dataclasses.replace(tiny.config, num_heads=4, decoder_num_heads=1))
    assert model.config == fresh.config
    assert torch.equal(model.rope_embed.periods, fresh.rope_embed.periods)
    assert torch.equal(model.rope_embed_decoder.periods, fresh.rope_embed_decoder.periods)


def test_half_precision_weights_become_float32_and_periods_exact(tiny, save):
    for dtype in (torch.bfloat16, torch.float16):
        model = load_pretrained(save({k: v.to(dtype) for k, v in tiny.state_dict().items()}))
        assert torch.equal(model.rope_embed.periods, tiny.rope_embed.periods)
        assert torch.equal(model.norm.weight, tiny.norm.weight)


@pytest.mark.parametrize("head_width", [16, 24, 64, 80])
def test_periods_that_were_computed_in_bfloat16_become_exact(head_width, save):
    encoder = Encoder(ModelConfig(head_width, 1, 1, 32, 2, 2))
    exponent = 2 * torch.arange(head_width // 4, dtype=torch.bfloat16) / (head_width // 2)
    state = encoder.state_dict() | {"rope_embed.periods": 100.0**exponent}  # as in the released encoder-only file
    assert state["rope_embed.periods"].dtype == torch.bfloat16
    file = save(state)
    assert torch.equal(load_pretrained(file).rope_embed.periods, state["rope_embed.periods"])
    exact = load_pretrained(file, rope_dtype="float32").rope_embed.periods
    assert torch.equal(exact, encoder.rope_embed.periods)
    # Periods of another base are kept.
    other = save(state | {"rope_embed.periods": 1000.0**exponent})
    kept = load_pretrained(other, rope_dtype="float32").rope_embed.periods
    assert torch.equal(kept, (1000.0**exponent).float())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_mismatch_is_listed(tiny, save, data):
    names = sorted(tiny.state_dict())
    # Few, since sizes are those of the majority.
    wrong = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    state, expected = dict(tiny.state_dict()), {"missing": [], "extra": [], "misshapen": []}
    for name in wrong:
        change = data.draw(st.sampled_from(["missing", "extra", "misshapen"]))
        if name.endswith("periods") and change == "misshapen":
            change = "extra"  # another number of periods is another number of heads
        expected[change].append(f"{name}_more" if change == "extra" else name)
        if change == "missing":
            del state[name]
        elif change == "extra":
            state[f"{name}_more"] = torch.zeros(1)
        else:
            state[name] = torch.zeros(*state[name].shape[:-1], state[name].shape[-1] + 1)
    with pytest.raises(MismatchError) as caught:
        load_pretrained(save(state))
    for kind, keys in expected.items():
        assert sorted(key.split(" ")[0] for key in getattr(caught.value, kind)) == sorted(keys)
        assert all(key in str(caught.value) for key in keys)
    assert "\n" not in str(caught.value)


def test_invalid_overrides(tiny, save):
    for overrides, words in (
        ({"norm_esp": 1e-6}, "'norm_esp'; the nearest is 'norm_eps'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"rope_dtype": torch.int8}, "rope_dtype is 'torch.int8'.* float32, bfloat16, float16"),
        ({"device": "nowhere"}, "device 'nowhere'"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"norm_eps": 2.0}, "norm_eps is 2.0"),
        ({"embed_dim": 64}, r"cls_token \[1, 1, 32\] .expected: \[1, 1, 64\]"),
        ({"ema": "maybe"}, "ema is 'maybe'"),
        ({"ema": True}, "no EMA weights"),
    ):
        with pytest.raises(WeightsError, match=words) as caught:
            load_pretrained(save(tiny.state_dict()), **overrides)
        assert "\n" not in str(caught.value)


class Custom:
    """An object that weights-only loading refuses."""


def test_files_that_hold_no_mum(tiny, tmp_path, save):
    damaged = save(tiny.state_dict(), "damaged")
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    save_file(tiny.state_dict(), cut := tmp_path / "cut")
    cut.write_bytes(cut.read_bytes()[:-10])
    (tmp_path / "text").write_text("these are no weights")
    (tmp_path / "empty").touch()
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "metadata", {"model_config": "{"})
    for path, words in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "text", "holds no weights"),
        (tmp_path / "empty", "holds no weights"),
        (damaged, "damaged' cannot be read"),
        (cut, "cut' cannot be read"),
        (tmp_path / "metadata", "the metadata of .* cannot be read"),
        (save([1, 2], "list"), "holds a list"),
        (save({"weight": torch.zeros(2)}, "other"), r"does not hold a MuM.*\(weight\)"),
        (save({"model": Custom()}, "custom"), r"test_load_pretrained.Custom"),
    ):
        with pytest.raises(WeightsError, match=words) as caught:
            load_pretrained(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


class Reference(NamedTuple):
    """A fixture of `shared/parity`: the constructor's arguments, the state dict, and what the model makes of images."""

    config: dict
    state: dict[str, Tensor]
    tensors: dict[str, Tensor]

    @property
    def norm_eps(self) -> float:
        return 1e-5 if self.config["norm_layer"] == "layernormbf16" else 1e-6

    @property
    def images(self) -> Tensor:
        return self.tensors["images"].flatten(0, 1)


@pytest.fixture(params=["reference_square", "reference_wide"])
def reference(request, shared) -> Reference:
    with safe_open(shared / "parity" / f"{request.param}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    return Reference(config, state, tensors)


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def features(model, images):
    with torch.no_grad():
        return model.forward_features(images)["x_norm_patchtokens"]


def test_features_of_the_released_model(reference, save):
    model = load_pretrained(save(reference.state), norm_eps=reference.norm_eps)
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
    assert pretrained.config == PRESETS["mum_vitl16_released"]
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
    model = load_pretrained(encoder_file)
    assert type(model) is Encoder
    assert model.rope_embed.periods.dtype == torch.bfloat16
    assert difference(features(model, reference.images), theirs) < 2e-6
    exact = load_pretrained(encoder_file, rope_dtype="float32")
    assert difference(features(exact, reference.images), theirs) > 1e-5


def test_positions_in_either_precision_from_either_file(reference, encoder_file, save):
    whole = save(reference.state, "whole")
    for rope in ("float32", torch.bfloat16):
        ours, theirs = (
            features(load_pretrained(file, rope_dtype=rope, encoder_only=True), reference.images)
            for file in (whole, encoder_file)
        )
        assert torch.equal(ours, theirs)
    exact = load_pretrained(encoder_file, rope_dtype="float32", norm_eps=reference.norm_eps)
    assert difference(features(exact, reference.images), reference.tensors["features.patch"]) < 1e-5


def test_parameters_in_bfloat16_keep_positions_in_float32(reference, save):
    model = load_pretrained(save(reference.state), dtype="bfloat16", norm_eps=reference.norm_eps)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert difference(features(model, reference.images).float(), reference.tensors["features.patch"]) < 0.02
