"""Which files load, how they are detected, one-line errors for the others, and the outputs of the released model."""

import argparse
import dataclasses
import json
import zipfile
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from released import TOLERANCE, difference, released_encoder
from safetensors.torch import save_file

from fastmum import PRESETS, ModelConfig, load_pretrained
from fastmum.engine.checkpoint import Checkpoints
from fastmum.model.encoder import Encoder
from fastmum.model.mum import MuM
from fastmum.pretrained import MismatchError, WeightsError, read_pretrained
from fastmum.pretrained.layout import resample_patches


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


def error_of(file, **overrides) -> str:
    with pytest.raises(WeightsError) as caught:
        load_pretrained(file, **overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
        {k: torch.nn.Parameter(v) for k, v in s.items()},
        {"teacher": {f"module.backbone.{k}": v for k, v in s.items()}, "optimizer": {"state": {}}},
        {"teacher": {f"backbone.{k}": v for k, v in s.items()} | {"dino_head.weight": torch.zeros(3)}},
    ):
        assert_same(load_pretrained(save(wrapped)), tiny)
    assert "'teacher.backbone'" in caplog.text
    assert "dino_head.weight" in caplog.text


def test_of_several_models_one_must_be_chosen(tiny, save):
    other = {f"backbone.{name}": tensor + 1 for name, tensor in tiny.state_dict().items()}
    file = save({"student": other, "teacher": tiny.state_dict()})
    assert "'student.backbone', 'teacher'" in error_of(file)
    assert "key='ema'; there is one at 'student.backbone', 'teacher'" in error_of(file, key="ema")
    assert_same(load_pretrained(file, key="teacher"), tiny)
    assert torch.equal(load_pretrained(file, key="student").norm.bias, other["backbone.norm.bias"])


def test_encoder_only(tiny, save):
    encoder = load_pretrained(save(tiny.state_dict()), encoder_only=True)
    assert_same(encoder, tiny, Encoder)
    alone = save(encoder.state_dict(), "alone")
    assert_same(load_pretrained(alone), tiny, Encoder)
    assert "encoder_only is False" in error_of(alone, encoder_only=False)


def test_patches_are_resampled(save):
    """Resized patches have the same tokens: any if they are enlarged, those that the resizing keeps otherwise."""
    whole = MuM(ModelConfig(32, 1, 2, 32, 2, 2))
    file, original = save(whole.state_dict()), whole.patch_embed.proj.weight
    for size in (24, 16, 8):
        encoder = load_pretrained(file, encoder_only=True, patch_size=size)
        kernel = encoder.patch_embed.proj.weight
        assert encoder.config.patch_size == size
        patches = torch.zeros(5, 3, 16, 16, requires_grad=True)
        resize = partial(F.interpolate, size=(size, size), mode="bilinear", antialias=True)
        (patches,) = torch.autograd.grad(resize(patches), patches, torch.randn(5, 3, size, size))
        expected = torch.einsum("dcyx,bcyx->bd", original, patches)
        tokens = torch.einsum("dcyx,bcyx->bd", kernel, resize(patches))
        assert (tokens - expected).norm() < 1e-5 * expected.norm()
        encoder(torch.zeros(1, 2 * size, 3 * size, 3, dtype=torch.uint8))
    wide, threads, found = torch.randn(512, 3, 16, 16), torch.get_num_threads(), []
    for count in (1, 2):  # the digest of a frozen encoder may not depend on them
        torch.set_num_threads(count)
        found.append(resample_patches(wide, 14))
    torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert "patch_embed.proj.weight" in error_of(file, patch_size=8)  # a decoder predicts patches of one size


def test_heads_and_half_precision(tiny, save):
    """Given heads override those of the periods, which are exact also from weights in half precision."""
    for dtype in (torch.bfloat16, torch.float16):
        model = load_pretrained(save({k: v.to(dtype) for k, v in tiny.state_dict().items()}))
        assert torch.equal(model.rope_embed.periods, tiny.rope_embed.periods)
        assert torch.equal(model.norm.weight, tiny.norm.weight)
    model = load_pretrained(save(tiny.state_dict()), num_heads=4, decoder_num_heads=1)
    fresh = MuM(dataclasses.replace(tiny.config, num_heads=4, decoder_num_heads=1))
    assert model.config == fresh.config
    assert torch.equal(model.rope_embed.periods, fresh.rope_embed.periods)
    assert torch.equal(model.rope_embed_decoder.periods, fresh.rope_embed_decoder.periods)


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


def test_every_mismatch_is_listed(tiny, save):
    names = [name for name in tiny.state_dict() if not name.endswith("periods")]
    for missing, extra, misshapen in zip(names, names[7:], names[13:], strict=False):
        state = dict(tiny.state_dict())
        state[f"{extra}_more"] = state.pop(missing)
        state[misshapen] = F.pad(state[misshapen], (0, 1))
        with pytest.raises(MismatchError) as caught:
            load_pretrained(save(state))
        listed = [*caught.value.missing, *caught.value.extra, *caught.value.misshapen]
        assert [key.split(" ")[0] for key in listed] == [missing, f"{extra}_more", misshapen]
        assert all(key in str(caught.value) for key in listed)
        assert "\n" not in str(caught.value)


def test_invalid_overrides(tiny, save):
    file = save(tiny.state_dict())
    for overrides, words in (
        ({"norm_esp": 1e-6}, "'norm_esp'; the nearest is 'norm_eps'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"rope_dtype": torch.int8}, "rope_dtype is 'torch.int8'"),
        ({"device": "nowhere"}, "device 'nowhere'"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"norm_eps": 2.0}, "norm_eps is 2.0"),
        ({"embed_dim": 64}, "cls_token [1, 1, 32] (expected: [1, 1, 64]"),
        ({"ema": "maybe"}, "ema is 'maybe'"),
        ({"ema": True}, "no EMA weights"),
    ):
        assert words in error_of(file, **overrides)


class Custom:
    """An object that weights-only loading refuses."""


def test_files_that_hold_no_mum(tiny, tmp_path, save):
    damaged = save(tiny.state_dict(), "damaged")
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    save_file(tiny.state_dict(), cut := tmp_path / "cut")
    cut.write_bytes(cut.read_bytes()[:-10])
    save_file(tiny.state_dict(), tmp_path / "deep", {"model_config": '{"depth": 1000000000}'})
    save_file(tiny.state_dict(), tmp_path / "list", {"model_config": "[1]"})
    save_file(tiny.state_dict() | {"blocks.999999999.a": torch.zeros(1)}, tmp_path / "number")
    packed = tmp_path / "packed"
    with (
        zipfile.ZipFile(save(tiny.state_dict(), "plain")) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as out,
    ):
        for name in plain.namelist():
            out.writestr(name, plain.read(name))
    (tmp_path / "text").write_text("these are no weights")
    (tmp_path / "empty").touch()
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "metadata", {"model_config": "{"})
    for path, words in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "text", "holds no weights"),
        (tmp_path / "empty", "holds no weights"),
        (damaged, "cannot be read"),
        (cut, "cannot be read"),
        (tmp_path / "metadata", "the metadata of"),
        (tmp_path / "deep", "depth is 1000000000"),
        (tmp_path / "list", "the metadata of"),
        (tmp_path / "number", "depth is 1000000000"),
        (packed, "compressed"),
        (save(tiny.state_dict() | {"norm.bias": torch.zeros(32).to_sparse()}, "sparse"), "norm.bias"),
        (save(tiny.state_dict() | {"norm.bias": torch.zeros(32, dtype=torch.complex64)}, "complex"), "norm.bias"),
        (save([1, 2], "pair"), "holds a list"),
        (save({"weight": torch.zeros(2)}, "other"), "(weight)"),
        (save({"model": Custom()}, "custom"), "test_load_pretrained.Custom"),
    ):
        error = error_of(path)
        assert f"'{path}'" in error
        assert words in error


def features(model, images):
    with torch.no_grad():
        return model.forward_features(images)["x_norm_patchtokens"]


def test_features_of_the_released_model(released, save):
    model = load_pretrained(save(released.state), norm_eps=released.norm_eps)
    assert type(model) is MuM
    assert released.sizes.items() <= vars(model.config).items()
    released.check_features(model)
    config, noise = released.config, released.tensors["mask_noise"]
    loss = model(released.images, [config["S"]] * config["B"], config["mask_ratio"], noise).loss
    assert difference(loss, released.tensors["loss"][0]) < TOLERANCE  # heads are right


@pytest.mark.parametrize(
    ("name", "encoder_only", "rope"),
    [("MuM_ViTLarge_BaseDecoder.pth", False, torch.float32), ("MuM_ViTLarge.pth", True, torch.bfloat16)],
)
def test_the_released_files_by_their_shapes(shared, save, name, encoder_only, rope):
    state = json.loads((shared / "parity/official_state_dict_shapes.json").read_text())[name]
    for key, value in state.items():
        shape, dtype = value if encoder_only else (value, "torch.float32")
        state[key] = torch.zeros(1, dtype=getattr(torch, dtype.removeprefix("torch."))).expand(shape)
    pretrained = read_pretrained(save(state))
    assert pretrained.config == PRESETS["mum_vitl16_released"]
    assert (pretrained.encoder_only, pretrained.rope_dtype) == (encoder_only, rope)
    assert "mum_vitl16_released" in pretrained.title


@pytest.fixture
def encoder_file(released, save):
    """The encoder as in the released encoder-only file, with bfloat16 periods."""
    state = {name: t for name, t in released.state.items() if not name.startswith(("decoder", "mask", "rope_embed_d"))}
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    return save(state)


def test_the_encoder_only_file_has_positions_in_bfloat16(released, encoder_file, save):
    theirs = released_encoder(released.state, released.images, released.config["num_heads"], 1e-5)
    model = load_pretrained(encoder_file)
    assert type(model) is Encoder
    assert model.rope_embed.periods.dtype == torch.bfloat16
    assert difference(features(model, released.images), theirs) < 2e-6
    whole = load_pretrained(save(released.state, "whole"), rope_dtype=torch.bfloat16, encoder_only=True)
    assert torch.equal(features(whole, released.images), features(model, released.images))
    exact = load_pretrained(encoder_file, rope_dtype="float32")
    assert difference(features(exact, released.images), theirs) > 1e-5
    released.check_features(load_pretrained(encoder_file, rope_dtype="float32", norm_eps=released.norm_eps))


def test_parameters_in_bfloat16_keep_positions_in_float32(released, save):
    model = load_pretrained(save(released.state), dtype="bfloat16", norm_eps=released.norm_eps)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert difference(features(model, released.images).float(), released.tensors["features.patch"]) < 0.02
