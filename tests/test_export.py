"""`python -m fastmum.export`: the formats that hold weights, of runs as training saves them."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open

from fastmum import PRESETS, MuM, load_pretrained
from fastmum.config.schema import OptimSection
from fastmum.engine.checkpoint import Checkpoints
from fastmum.engine.optimizer import build_optimizer
from fastmum.export import FORMATS, export, released_state
from fastmum.export.__main__ import main
from fastmum.model.encoder import Encoder
from fastmum.pretrained import WeightsError, read_pretrained


@pytest.fixture
def run(tmp_path, tiny):
    """A run with checkpoints of the steps 3 and 7, whose weights are those of `tiny`, as training saves them."""
    folder = tmp_path / "run"
    writer = Checkpoints(folder / "checkpoints", keep=2)
    state = build_optimizer(tiny, OptimSection()).state()
    for step in (3, 7):
        writer.save(step, state, {"model_config": dataclasses.asdict(tiny.config)})
    writer.close()
    return folder


def test_the_released_layout(shared):
    released = json.loads((shared / "parity/official_state_dict_shapes.json").read_text())
    config = PRESETS["mum_vitl16_released"]
    with torch.device("meta"):
        whole, encoder = MuM(config).state_dict(), Encoder(config).state_dict()

    def shapes_and_dtypes(state):
        return {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in state.items()}

    expected = {name: [shape, "torch.float32"] for name, shape in released["MuM_ViTLarge_BaseDecoder.pth"].items()}
    assert shapes_and_dtypes(released_state(whole, encoder_only=False)) == expected
    assert shapes_and_dtypes(released_state(encoder, encoder_only=True)) == released["MuM_ViTLarge.pth"]


def test_a_run(run, capsys):
    assert main([str(run / "checkpoints")]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in (str(run / "mum_0000007.pth"), "step_0000007"))
    (run / "checkpoints/step_0000007/.metadata").write_bytes(b"")
    assert export(run).source.step == 3  # the newest whole one


@pytest.mark.parametrize("encoder_only", [False, True])
@pytest.mark.parametrize("name", ["released", "safetensors"])
def test_exports_load(run, tiny, tmp_path, name, encoder_only):
    out = None if name == "released" else tmp_path / "new/weights"
    file = export(run, name, out, encoder_only).file
    assert file == (out or run / f"mum_0000007{'_encoder' * encoder_only}.pth")
    if name == "released":
        weights = torch.load(file, weights_only=True)
        assert encoder_only or list(weights) == list(tiny.state_dict())
        assert all(tensor.is_contiguous() for tensor in weights.values())
    else:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert json.loads(metadata["model_config"]) == dataclasses.asdict(tiny.config)
        assert (metadata["step"], read_pretrained(file).step) == ("7", 7)
    model = load_pretrained(file, rope_dtype="float32")
    assert type(model) is (Encoder if encoder_only else MuM)
    assert (model.config.num_heads, model.config.norm_eps) == (tiny.config.num_heads, tiny.config.norm_eps)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, tiny.state_dict()[key]), key


def test_rights_are_those_that_the_umask_asks_for(run):
    before = os.umask(0o027)
    try:
        files = [export(run, name).file for name in ("released", "safetensors", "hf")]
    finally:
        os.umask(before)
    written = [file for path in files for file in ([path] if path.is_file() else path.iterdir())]
    assert {oct(file.stat().st_mode & 0o777) for file in written} == {"0o640"}
    assert [path.name for path in run.iterdir() if "mode" in path.name] == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name == "onnx")) for name in FORMATS]
)
def test_failures_keep_the_existing_file(run, name, monkeypatch, refusal):
    file = run / f"mum_0000007{FORMATS[name].suffix}"
    file.write_bytes(b"precious")
    assert "--force" in refusal(main, run, "--format", name)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        assert f"'{file}' cannot be written (No space" in refusal(main, run, "--format", name, "--force")
    assert file.read_bytes() == b"precious"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", file.name]
    if name == "released":
        assert main([str(run), "--format", name, "--force"]) == 0
        assert file.stat().st_size > 100_000


def test_mistakes_are_one_line(run, tmp_path, refusal):
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([tmp_path / "empty"], f"no checkpoint in '{tmp_path}/empty'"),
        ([run, "--format", "none"], ", ".join(FORMATS)),
        ([run, "--out", run], f"--out is '{run}'"),
        ([run, "--set", "encoder_only=1"], "--encoder-only"),
        ([run, "--set", "ema=on"], "--ema"),
        ([run, "--ema", "on"], "no EMA weights"),
        ([run, "--set", "norm_eps=[1"], "--set is 'norm_eps=[1'"),
        ([run, "--out", "/proc/none/a.pth"], "'/proc/none/a.pth'"),
        ([run, "--set", "num_heads=010"], "num_heads 10"),
        ([run, "--set", "key=007"], "key='007'"),
        ([run, "--set", "force=1"], "unknown override 'force'"),
    ):
        assert message in refusal(main, *words)


def test_ema_weights(tmp_path, tiny, capsys, caplog):
    """A checkpoint with averages of all parameters but a frozen one, which keeps its value."""
    parameters = {name: p.detach() for name, p in tiny.named_parameters()}
    state = {f"model.{name}": p for name, p in parameters.items()}
    state |= {f"ema.{name}": p + 1 for name, p in parameters.items() if name != "cls_token"}
    writer = Checkpoints(tmp_path / "checkpoints", keep=1)
    writer.save(7, state, {"task": "mum", "model_config": dataclasses.asdict(tiny.config)})
    writer.close()
    for word, ema in (("auto", True), ("on", True), ("off", False)):
        caplog.clear()
        with caplog.at_level("INFO", "fastmum"):
            assert main([str(tmp_path), "--ema", word, "--force"]) == 0
        out = capsys.readouterr().out
        assert ("EMA" in out, "EMA" in caplog.text) == (ema, ema)
        weights = torch.load(tmp_path / "mum_0000007.pth", weights_only=True)
        for name, parameter in parameters.items():
            assert torch.equal(weights[name], parameter + (ema and name != "cls_token")), name


def test_untrained_weights(tmp_path):
    file, sizes = tmp_path / "untrained.safetensors", {"patch_size": 8, "seed": 3}
    words = [word for name, value in sizes.items() for word in ("--set", f"{name}={value}")]
    assert main(["random:mum_tiny", *words, "--format", "safetensors", "--out", str(file)]) == 0
    truth, loaded = load_pretrained("random:mum_tiny", **sizes), load_pretrained(file)
    assert loaded.config == truth.config
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), truth.state_dict().values(), strict=True)
    )


def test_checkpoints_of_something_else(tmp_path, tiny):
    writer = Checkpoints(tmp_path, keep=1)
    state, config = {f"model.{n}": tensor for n, tensor in tiny.state_dict().items()}, dataclasses.asdict(tiny.config)
    damaged = state | {"model.cls_token": torch.zeros(1, 1, 31)}
    for step, (tensors, values, message) in enumerate((
        ({"model.weight": torch.zeros(3)}, {"model_config": {}}, "does not hold a MuM"),
        ({"model.encoder.weight": torch.zeros(3)}, {"task": "depth", "model_config": {"depth": 2}}, "task 'depth'"),
        (state, {"model_config": config | {"heads": 3}}, "one of a MuM is expected"),
        (state, {"model_config": {"depth": 0}}, "depth is 0"),
        (damaged, {"model_config": config}, r"cls_token \[1, 1, 31\] \(expected: \[1, 1, 32\]\)"),
    )):  # fmt: skip
        writer.save(step + 1, tensors, values)
        writer.wait()
        with pytest.raises(WeightsError, match=message):
            export(tmp_path)
