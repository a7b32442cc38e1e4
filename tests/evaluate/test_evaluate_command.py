"""The command line, from weights to a page."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image

from fastmum import PRESETS, MuM
from fastmum.data.errors import DataError
from fastmum.evaluate.__main__ import load_weights, main
from fastmum.evaluate.results import PUBLISHED, read, save, table

QUICK = ["--size", "64", "--pictures", "1", "--device", "cpu"]
PROBES = ["--steps", "6", "--every", "3", "--batch", "2", "--learning-rates", "1e-3", "1e-2", "--weight-decays", "0"]


@pytest.fixture
def weights(tmp_path):
    """A file of weights; encoder.pth has no decoder."""
    torch.manual_seed(1)
    state = MuM(PRESETS["mum_tiny"]).state_dict()
    file = tmp_path / "small.pth"
    torch.save(state, file)
    decoder = ("decoder", "mask_token", "rope_embed_decoder")
    torch.save({k: v for k, v in state.items() if not k.startswith(decoder)}, tmp_path / "encoder.pth")
    return file


def run(task, weights, data, out, *words):
    return main([task, "--weights", str(weights), "--data", str(data), "--out", str(out), *QUICK, *words])


def test_three_evaluations_make_one_page(weights, wall_file, tmp_path, capsys):
    out = tmp_path / "results"
    assert run("matching", weights, wall_file, out, *PROBES) == 0
    assert run("cosine", weights, wall_file, out, "--name", "mine & yours") == 0
    assert run("attention", "random:mum_tiny", wall_file, out, "--max-pairs", "3") == 0
    printed = capsys.readouterr().out
    records = {record.content["task"]: record for record in read(out)}
    matching, cosine, attention = (records[task].content for task in ("matching", "cosine", "attention"))
    assert (matching["weights"], cosine["weights"]) == ("small", "mine & yours")
    assert attention["weights"] == "untrained mum_tiny"
    assert [each["pairs"] for each in (matching, cosine, attention)] == [4, 8, 3]  # half is for training
    assert all(each["set"] == "wall" for each in (matching, cosine, attention))
    assert [each["step"] for each in matching["probes"][0]["evaluations"]] == [3, 6]
    assert matching["settings"]["train_pairs"] == 4
    assert all(len(record.pictures) == 1 for record in records.values())
    for name in ("epe", "robustness", "pck1", "pck3", "pck5"):
        assert 0 <= matching["scores"][name] < 1000

    text = (out / "table.md").read_text()
    assert text in printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    named = {(row[0], row[1]): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert named["linear probe", "MegaDepth"]["paper: MuM"] == "10.2"
    assert named["cosine", "NAVI"]["paper: DINOv3"] == "62.8"
    assert named["linear probe", "wall"]["EPE ↓"] == f"{matching['scores']['epe']:.1f}"
    assert named["no motion", "wall"]["EPE ↓"] == f"{matching['no_motion']['epe']:.1f}"

    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert page.count("<svg") == 2
    assert "mine &amp; yours" in page
    assert not re.search(r'\s(src|href)="(?!data:)', page)  # no other file
    assert "</html>" in page


def test_a_result_never_replaces_another(weights, wall_file, tmp_path, monkeypatch, capsys):
    """Names that differ in punctuation, and different files of one name."""
    out, other = tmp_path / "out", tmp_path / "other/small.pth"
    other.parent.mkdir()
    other.write_bytes(weights.read_bytes())
    assert run("cosine", weights, wall_file, out, "--name", "a b") == 0
    (first,) = read(out)
    assert run("cosine", tmp_path / "other/../small.pth", wall_file, out, "--name", "a b", "--pictures", "0") == 0
    before = read(out)  # the same weights: replaced
    assert [record.content["scores"] for record in before] == [first.content["scores"]]
    assert (len(first.pictures), before[0].pictures) == (1, [])
    with pytest.raises(DataError, match="'a/b' on 'wall' would replace those of 'a b' on 'wall'"):
        save(out, result("a/b"), [])
    monkeypatch.setattr("fastmum.evaluate.__main__.evaluate_cosine", None)  # fails before the evaluation
    for source, name in ((weights, "a/b"), (other, "a b")):
        assert run("cosine", source, wall_file, out, "--name", name) == 2
        error = capsys.readouterr().err
        assert "--name or --out" in error
        assert error.count("\n") == 1
    assert str(other) in error
    assert "other/../small.pth'" in error
    assert read(out) == before


def test_data_to_train_on(weights, wall_file, rendered, tmp_path, capsys):
    """Another set: everything is tested on. The same set by another name: it is split. Shared pictures: an error."""
    assert run("matching", weights, wall_file, tmp_path / "a", *PROBES, "--train-data", str(rendered)) == 0
    (record,) = read(tmp_path / "a")
    assert record.content["pairs"] == 8
    assert record.content["settings"]["train_set"] == f"{rendered.name} (folder)"
    assert run("matching", weights, wall_file, tmp_path / "b", *PROBES, "--train-data", f"{wall_file.parent}/") == 0
    assert read(tmp_path / "b")[0].content["pairs"] == 4
    other = wall_file.with_name("other.jsonl")
    other.write_text(wall_file.read_text())
    assert run("matching", weights, wall_file, tmp_path / "c", *PROBES, "--train-data", str(other)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"'{other}' and --data '{wall_file}' share picture '" in error


def test_order_and_random_weights_follow_the_seed(wall_file, tmp_path):
    found = []
    for i, seed in enumerate(("0", "0", "1")):
        out = tmp_path / str(i)
        assert run("matching", "random:mum_tiny", wall_file, out, *PROBES, "--seed", seed, "--pictures", "0") == 0
        found.append(read(out)[0].content["probes"])
    assert found[0] == found[1] != found[2]


def test_an_untrained_model_of_other_sizes(wall_file, tmp_path):
    sizes = ["--set", "patch_size=8", "--override", "depth=2"]  # an alias
    assert run("cosine", "random:mum_tiny", wall_file, tmp_path / "out", *sizes, "--pictures", "0") == 0
    assert read(tmp_path / "out")[0].content["weights"] == "untrained mum_tiny"
    model = load_weights("random:mum_tiny", None, torch.device("cpu"), {"patch_size": 8, "depth": 2}).model
    assert (model.config.patch_size, len(model.blocks)) == (8, 2)


def test_names_of_weights(weights, monkeypatch):
    monkeypatch.setattr("fastmum.load_pretrained", lambda source, device: None)
    for source, name in (
        ("runs/a", "a"), ("runs/a/checkpoints", "a"), ("runs/a/checkpoints/step_7", "a step_7"), (weights, "small"),
    ):  # fmt: skip
        assert load_weights(str(source), None, torch.device("cpu"), {}).name == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--weights", "random:mum_huge"], "'mum_huge'"),
        (["--weights", "random:mum_tiny", "--set", "key=teacher"], "--set key"),
        (["--weights", "random:mum_tiny", "--set", "norm_eps=small"], "--set: norm_eps is 'small'"),
        (["--weights", "random:mum_tiny", "--set", "num_heads=5"], "num_heads 5"),
        (["--set", "depth"], "KEY=VALUE"),
        (["--set", "device=cpu"], "--device"),
        (["--set", "deepth=3"], "'depth'"),
        (["--data", "nowhere"], "'nowhere'"),
        (["--size", "50"], "patch size 16"),
        (["--steps", "0"], "--steps is 0"),
        (["--every", "0"], "--every is 0"),
        (["--learning-rates", "-1"], "--learning-rates are [-1.0]"),
        (["--weight-decays", "-1"], "--weight-decays are [-1.0]"),
        (["--batch", "0"], "--batch is 0"),
        (["--max-pairs", "0"], "--max-pairs is 0"),
        (["--temperature", "0"], "--temperature is 0"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--out", "small.pth"], "--out 'small.pth'"),
    ],
)
def test_errors_are_one_line(weights, wall_file, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    base = ["matching", "--weights", "small.pth", "--data", str(wall_file), "--out", "out", *QUICK, *PROBES]
    assert main([*base, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_out_of_memory_is_one_line(weights, tmp_path, monkeypatch, capsys):
    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("fastmum.evaluate.__main__._run", full)
    for task in ("matching", "cosine", "attention", "views"):
        assert run(task, weights, "scenes", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the memory of the device is too small: lower --")
        assert error.count("\n") == 1


def test_attention_needs_a_decoder(weights, wall_file, tmp_path, capsys):
    assert run("attention", tmp_path / "encoder.pth", wall_file, tmp_path / "out") == 2
    assert "decoder" in capsys.readouterr().err
    assert run("cosine", tmp_path / "encoder.pth", wall_file, tmp_path / "out") == 0


def test_help_names_every_kind_of_data(capsys):
    with pytest.raises(SystemExit):
        main(["matching", "--help"])
    text = capsys.readouterr().out
    for word in ("scenes", "motorcycle", "megadepth", "scannet", "navi", "pairs.jsonl", "random:PRESET"):
        assert word in text


def test_other_json_files_are_an_error(tmp_path, weights, wall_file, capsys):
    file = tmp_path / "out/other.json"
    file.parent.mkdir()
    file.write_text("[]")
    assert run("cosine", weights, wall_file, tmp_path / "out") == 2
    assert "other.json'" in capsys.readouterr().err
    content = result("mine")
    changes = [{"scores": []}, {"weights": None}, {"task": "cooking"}]
    for wrong in [
        *({k: v for k, v in content.items() if k != key} for key in content),
        *(content | c for c in changes),
    ]:
        file.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=r"other.json'"):
            read(file.parent)
    file.write_text(json.dumps(content))
    assert len(read(file.parent)) == 1


def result(weights, **scores):
    return {"task": "cosine", "set": "wall", "weights": weights, "scores": scores, "settings": {}}


def test_results_that_are_no_json_leave_the_pictures(tmp_path):
    save(tmp_path, result("mine", epe=1.0), [Image.new("RGB", (8, 8))])
    with pytest.raises(DataError, match="'mine' on 'wall'"):
        save(tmp_path, result("mine", epe=float("nan")), [])
    (record,) = read(tmp_path)
    assert record.content["scores"] == {"epe": 1.0}
    assert len(record.pictures) == 1


def test_table_of_the_papers_sets(tmp_path):
    scores = {"epe": 12.34, "robustness": 90.0, "pck1": 1.0, "pck3": 2.0, "pck5": None}
    content = {"task": "matching", "set": "megadepth", "weights": "ours", "scores": scores, "settings": {}}
    results = table([save(tmp_path, content, [])])
    row = next(row for row in results.rows if row[2] == "ours")
    cells = dict(zip(results.names, row, strict=True))
    assert (cells["EPE ↓"], cells["PCK@5 ↑"], cells["paper: MuM"]) == ("12.3", "–", "10.2")
    assert sum(row[1] == "MegaDepth" for row in results.rows) == 1
    for task, methods in PUBLISHED.items():
        assert all(set(values) <= {"megadepth", "scannet", "navi"} for values in methods.values()), task
