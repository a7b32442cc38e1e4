import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastmum import PRESETS, MuM
from fastmum.config.schema import OptimSection
from fastmum.engine.checkpoint import Checkpoints
from fastmum.engine.optimizer import build_optimizer
from fastmum.export import FORMATS, export, released_state
from fastmum.export.__main__ import main
from fastmum.model.encoder import Encoder


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


def shapes_and_dtypes(state):
    return {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in state.items()}


def test_the_released_layout_to_the_letter(shared):
    released = json.loads((shared / "parity/official_state_dict_shapes.json").read_text())
    config = PRESETS["mum_vitl16_released"]
    with torch.device("meta"):
        whole, encoder = MuM(config).state_dict(), Encoder(config).state_dict()
    expected = {name: [shape, "torch.float32"] for name, shape in released["MuM_ViTLarge_BaseDecoder.pth"].items()}
    assert shapes_and_dtypes(released_state(whole, encoder_only=False)) == expected
    assert shapes_and_dtypes(released_state(encoder, encoder_only=True)) == released["MuM_ViTLarge.pth"]


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step_0000007"])
def test_a_run_a_folder_of_checkpoints_or_one(run, tiny, where, capsys):
    assert main([str(run / where)]) == 0
    file = run / "mum_0000007.pth"
    parameters = sum(p.numel() for p in tiny.parameters())
    assert capsys.readouterr().out == (
        f"{file}: {parameters / 1e6:.1f} M parameters in {len(tiny.state_dict())} tensors, of step 7 "
        f"({run}/checkpoints/step_0000007)\n"
    )
    weights = torch.load(file, weights_only=True)
    assert list(weights) == list(tiny.state_dict())
    torch.testing.assert_close(weights, dict(tiny.state_dict()), rtol=0, atol=0)
    assert all(tensor.is_contiguous() for tensor in weights.values())


def test_the_encoder_alone(run, tiny):
    file = export(run, "released", encoder_only=True).file
    assert file == run / "mum_0000007_encoder.pth"
    weights = torch.load(file, weights_only=True)
    assert weights["rope_embed.periods"].dtype == torch.bfloat16
    encoder = Encoder(tiny.config)
    encoder.load_state_dict(weights)
    assert torch.equal(encoder.blocks[1].mlp.fc2.weight, tiny.blocks[1].mlp.fc2.weight)


@pytest.mark.parametrize("encoder_only", [False, True])
def test_safetensors_say_the_sizes_of_their_model(run, tiny, tmp_path, encoder_only):
    out = tmp_path / "new/weights.safetensors"
    assert export(run, "safetensors", out, encoder_only).file == out
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["model_config"]) == dataclasses.asdict(tiny.config)
    assert metadata["step"] == "7"
    (Encoder if encoder_only else MuM)(tiny.config).load_state_dict(load_file(out))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, caplog):
    (run / "checkpoints/step_0000007/.metadata").write_bytes(b"")
    assert export(run).about.step == 3
    assert "the one before is tried" in caplog.text


def test_what_is_there_stays_unless_told_otherwise(run, capsys):
    file = run / "mum_0000007.pth"
    file.write_bytes(b"precious")
    assert main([str(run)]) == 2
    assert (
        capsys.readouterr().err == f"error: '{file}' is there already; --force replaces it, --out names another file\n"
    )
    assert file.read_bytes() == b"precious"
    assert main([str(run), "--force"]) == 0
    assert file.stat().st_size > 100_000


@pytest.mark.parametrize(
    "name", ["released", "safetensors", "hf", pytest.param("onnx", marks=pytest.mark.exhaustive)], ids=list(FORMATS)
)
def test_what_fails_leaves_what_was_there(run, name, monkeypatch, capsys):
    file = run / f"mum_0000007{FORMATS[name].suffix}"
    file.write_bytes(b"precious")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    assert main([str(run), "--format", name, "--force"]) == 2
    assert capsys.readouterr().err == f"error: '{file}' cannot be written (No space left on device)\n"
    assert file.read_bytes() == b"precious"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", file.name]


def test_mistakes_are_one_line(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([str(tmp_path / "nothing")], f"'{tmp_path}/nothing' does not exist"),
        ([str(tmp_path / "empty")], f"there is no checkpoint in '{tmp_path}/empty'"),
        ([str(run), "--format", "none"], f"the format is 'none', but must be one of {', '.join(FORMATS)}"),
        ([str(run), "--out", str(run)], f"--out is '{run}', but that is a folder; name a file"),
        (
            [str(run), "--set", "encoder_only=1"],
            "--set is 'encoder_only=1', but encoder_only has a flag of its own: --encoder-only",
        ),
        ([str(run), "--set", "norm_eps=[1"], "--set is 'norm_eps=[1', but the value cannot be read as YAML"),
        ([str(run), "--out", "/proc/none/a.pth"], "'/proc/none/a.pth' cannot be written (No such file or directory)"),
    ):
        assert main(words) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert main([str(run), "--set", "force=1"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown override 'force'; ")
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / ".metadata").unlink()
    assert main([str(run)]) == 2
    assert capsys.readouterr().err.endswith(f"error: no checkpoint in '{run}' can be read\n")


def test_a_checkpoint_of_something_else(tmp_path, tiny):
    writer = Checkpoints(tmp_path, keep=1)
    whole = {f"model.{name}": tensor for name, tensor in tiny.state_dict().items()}
    for step, state, config, message in (
        (1, {"model.weight": torch.zeros(3)}, {}, "does not hold a MuM: none of cls_token"),
        (2, whole, {"depth": 0}, "does not hold a MuM of possible sizes .depth is 0"),
        (
            3, whole | {"model.cls_token": torch.zeros(1, 1, 31)}, dataclasses.asdict(tiny.config),
            r"does not hold the model that it names: .* cls_token \[1, 1, 31\] \(expected: \[1, 1, 32\]\)",
        ),
    ):  # fmt: skip
        writer.save(step, state, {"model_config": config})
        writer.wait()
        with pytest.raises(RuntimeError, match=message):
            export(tmp_path)


def test_help_lists_the_formats(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{name} " in text for name in FORMATS)
    assert "RUN" in text
