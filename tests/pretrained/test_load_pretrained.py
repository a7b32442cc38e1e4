"""Which files load, how they are detected, and one-line errors for the others."""

import argparse
import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import fastmum
from fastmum import ModelConfig
from fastmum.engine.checkpoint import Checkpoints
from fastmum.model.encoder import Encoder
from fastmum.model.mum import MuM
from fastmum.pretrained import MismatchError, WeightsError, read_pretrained


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
        assert_same(fastmum.load_pretrained(tmp_path / where), tiny)
        assert read_pretrained(str(tmp_path / where)).step == 7
    del state["model.norm.weight"]
    writer.save(8, state, values)
    writer.close()
    with pytest.raises(MismatchError, match=r"norm.weight \[32\]$"):
        fastmum.load_pretrained(tmp_path)


WRAPPED = {
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled blocks": lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()},
    "model": lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "state_dict": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "loss": torch.zeros(2)},
    "teacher": lambda s: {"teacher": {f"module.backbone.{k}": v for k, v in s.items()}, "optimizer": {"state": {}}},
    "parameters": lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()},
}


def test_wrappers(tiny, save, caplog):
    for wrap in WRAPPED.values():
        assert_same(fastmum.load_pretrained(save(wrap(tiny.state_dict()))), tiny)
    state = {f"backbone.{k}": v for k, v in tiny.state_dict().items()} | {"dino_head.weight": torch.zeros(3)}
    assert_same(fastmum.load_pretrained(save({"teacher": state})), tiny)
    assert "'teacher.backbone'" in caplog.text
    assert "dino_head.weight" in caplog.text


def test_of_several_models_one_must_be_chosen(tiny, save):
    other = {name: tensor + 1 for name, tensor in tiny.state_dict().items()}
    file = save({"student": {f"backbone.{k}": v for k, v in other.items()}, "teacher": tiny.state_dict()})
    with pytest.raises(WeightsError, match=r"'student.backbone', 'teacher'"):
        fastmum.load_pretrained(file)
    for key in ("teacher", "student"):
        model = fastmum.load_pretrained(file, key=key)
        assert torch.equal(model.norm.bias, (tiny if key == "teacher" else model).norm.bias)
    assert torch.equal(model.norm.bias, other["norm.bias"])
    with pytest.raises(WeightsError, match=r"key='ema'.* 'student.backbone', 'teacher'"):
        fastmum.load_pretrained(file, key="ema")


def test_encoder_only(tiny, save):
    file = save(tiny.state_dict())
    encoder = fastmum.load_pretrained(file, encoder_only=True)
    assert_same(encoder, tiny, Encoder)
    alone = save(encoder.state_dict(), "alone")
    assert_same(fastmum.load_pretrained(alone), tiny, Encoder)
    with pytest.raises(WeightsError, match="encoder_only is False"):
        fastmum.load_pretrained(alone, encoder_only=False)


def test_heads_given_against_the_periods(tiny, save):
    model = fastmum.load_pretrained(save(tiny.state_dict()), num_heads=4, decoder_num_heads=1)
    fresh = MuM(dataclasses.replace(tiny.config, num_heads=4, decoder_num_heads=1))
    assert model.config == fresh.config
    assert torch.equal(model.rope_embed.periods, fresh.rope_embed.periods)
    assert torch.equal(model.rope_embed_decoder.periods, fresh.rope_embed_decoder.periods)


def test_half_precision_weights_become_float32_and_periods_exact(tiny, save):
    for dtype in (torch.bfloat16, torch.float16):
        model = fastmum.load_pretrained(save({k: v.to(dtype) for k, v in tiny.state_dict().items()}))
        assert torch.equal(model.rope_embed.periods, tiny.rope_embed.periods)
        assert torch.equal(model.norm.weight, tiny.norm.weight)


@pytest.mark.parametrize("head_width", [16, 24, 64, 80])
def test_periods_that_were_computed_in_bfloat16_become_exact(head_width, save):
    encoder = Encoder(ModelConfig(head_width, 1, 1, 32, 2, 2))
    exponent = 2 * torch.arange(head_width // 4, dtype=torch.bfloat16) / (head_width // 2)
    state = encoder.state_dict() | {"rope_embed.periods": 100.0**exponent}  # as in the released encoder-only file
    assert state["rope_embed.periods"].dtype == torch.bfloat16
    file = save(state)
    assert torch.equal(fastmum.load_pretrained(file).rope_embed.periods, state["rope_embed.periods"])
    exact = fastmum.load_pretrained(file, rope_dtype="float32").rope_embed.periods
    assert torch.equal(exact, encoder.rope_embed.periods)
    # Periods of another base are kept.
    other = save(state | {"rope_embed.periods": 1000.0**exponent})
    kept = fastmum.load_pretrained(other, rope_dtype="float32").rope_embed.periods
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
        fastmum.load_pretrained(save(state))
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
            fastmum.load_pretrained(save(tiny.state_dict()), **overrides)
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
            fastmum.load_pretrained(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
