"""The command line, from weights to a page."""

import json
import re
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from fastmum import PRESETS, MuM
from fastmum.data.errors import DataError
from fastmum.evaluate.__main__ import main
from fastmum.evaluate.commands import load_weights
from fastmum.evaluate.records import read, save
from fastmum.evaluate.results import table
from fastmum.pretrained import read_pretrained

QUICK = ["--size", "64", "--pictures", "1", "--device", "cpu"]
PROBES = ["--steps", "6", "--every", "3", "--batch", "2", "--learning-rates", "1e-3", "1e-2", "--weight-decays", "0"]


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(1)
    file = tmp_path / "small.pth"
    torch.save(MuM(PRESETS["mum_tiny"]).state_dict(), file)
    return file


def run(task, weights, data, out, *words):
    return main([task, "--weights", str(weights), "--data", str(data), "--out", str(out), *QUICK, *words])


def error_of(code, capsys):
    """The one line that a failed command prints, below progress bars."""
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert line.startswith("error: ")
    return line


def test_three_evaluations_make_one_page(weights, wall_file, tmp_path, capsys):
    out, scores = tmp_path / "out", []
    assert run("matching", weights, wall_file, out, *PROBES) == 0
    for _ in range(2):  # the second time from the cache
        assert run("discriminant", weights, wall_file, out, "--cache", str(tmp_path / "cache")) == 0
        scores.append(read(out)[1].content["scores"])
    assert scores[0] == scores[1]
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 16
    assert run("cosine", weights, wall_file, out, "--name", "mine & yours") == 0
    assert run("attention", "random:mum_tiny", wall_file, out, "--max-pairs", "3") == 0
    printed, records = capsys.readouterr().out, read(out)
    about = [tuple(record.content[key] for key in ("task", "weights", "set", "pairs")) for record in records]
    assert about == [
        ("matching", "small", "wall", 4),  # half is for training
        ("discriminant", "small", "wall", 4),
        ("cosine", "mine & yours", "wall", 8),
        ("attention", "untrained mum_tiny", "wall", 3),
    ]
    matching = records[0].content
    evaluations = [each for probe in matching["probes"] for each in probe["evaluations"]]
    assert [each["step"] for each in evaluations] == [3, 6, 3, 6]
    assert matching["scores"]["epe"] == pytest.approx(min(each["epe"] for each in evaluations))
    assert matching["settings"]["train_pairs"] == 4
    assert all(len(record.pictures) == 1 for record in records)
    assert set(matching["scores"]) == {"epe", "robustness", "pck1", "pck3", "pck5", "pairs"}
    text = (out / "table.md").read_text()
    assert text in printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    named = {tuple(row[:3]): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert named["cosine", "NAVI", "–"]["paper: DINOv3"] == "62.8"
    assert named["linear probe", "wall", "4"]["EPE ↓"] == f"{matching['scores']['epe']:.1f}"
    for record in records:  # the identity warp belongs to the pairs
        expected = f"{record.content['no_motion']['epe']:.1f}"
        assert named["no motion", "wall", str(record.content["pairs"])]["EPE ↓"] == expected
    page = (out / "report.html").read_text()
    assert [page.count(text) for text in ("data:image/jpeg;base64,", "<svg", "</html>")] == [4, 2, 1]
    assert "mine &amp; yours" in page
    assert not re.search(r'\s(src|href)="(?!data:)', page)  # no other file


def test_a_result_never_replaces_another(weights, wall_file, tmp_path, monkeypatch, capsys):
    """Names that differ in punctuation, and different files of one name."""
    out, other = tmp_path / "out", tmp_path / "other/small.pth"
    other.parent.mkdir()
    other.write_bytes(weights.read_bytes())
    assert run("cosine", weights, wall_file, out, "--name", "a b") == 0
    assert len(read(out)[0].pictures) == 1
    assert run("cosine", tmp_path / "other/../small.pth", wall_file, out, "--name", "a b", "--pictures", "0") == 0
    before = read(out)  # the same weights: replaced
    assert [record.pictures for record in before] == [[]]
    with pytest.raises(DataError, match=r"'a/b' on 'wall' .* 'a b' on 'wall'"):
        save(out, result("a/b"), [])
    monkeypatch.setattr("fastmum.evaluate.commands.evaluate_cosine", None)  # fails before the evaluation
    for source, name in ((weights, "a/b"), (other, "a b")):
        error = error_of(run("cosine", source, wall_file, out, "--name", name), capsys)
        assert "--name or --out" in error
    assert f"'{other}'" in error
    assert "other/../small.pth'" in error
    assert read(out) == before


def test_data_to_train_on(weights, wall_file, rendered, tmp_path, capsys):
    """Another set: everything is tested on. The same set by another name: it is split. Shared pictures: an error."""
    assert run("matching", weights, wall_file, tmp_path / "a", *PROBES, "--train-data", str(rendered)) == 0
    content = read(tmp_path / "a")[0].content
    assert (content["pairs"], content["settings"]["train_set"]) == (8, f"{rendered.name} (folder)")
    assert run("matching", weights, wall_file, tmp_path / "b", *PROBES, "--train-data", f"{wall_file.parent}/") == 0
    assert read(tmp_path / "b")[0].content["pairs"] == 4
    other = wall_file.with_name("other.jsonl")
    other.write_text(wall_file.read_text())
    code = run("matching", weights, wall_file, tmp_path / "c", *PROBES, "--train-data", str(other))
    assert f"'{other}' and --data '{wall_file}' share picture '" in error_of(code, capsys)


def test_order_and_random_weights_follow_the_seed(wall_file, tmp_path):
    found = []
    for i, seed in enumerate(("0", "0", "1")):
        words = ["--seed", seed, "--pictures", "0", "--set", "patch_size=8", "--override", "depth=2"]  # an alias
        assert run("matching", "random:mum_tiny", wall_file, tmp_path / str(i), *PROBES, *words) == 0
        found.append(read(tmp_path / str(i))[0].content["probes"])
    assert found[0] == found[1] != found[2]


def test_names_of_weights(weights):
    pretrained = read_pretrained(weights)
    specs = "runs/a", "runs/a/checkpoints", "runs/a/checkpoints/step_7", str(weights), f"mae:{weights}"
    names = [pretrained._replace(spec=spec).name for spec in (*specs, "random:mum_tiny")]
    assert names == ["a", "a", "a step_7", "small", "small", "untrained mum_tiny"]
    about, model = load_weights(str(weights), None, torch.device("cpu"), {})
    assert (about["weights"], about["source"], about["frames"]) == ("small", str(weights), None)
    assert about["encoder"] == model.about


ERRORS = [
    ("--weights nowhere.pth", "nowhere.pth"), ("--weights random:mum_huge", "'mum_huge'"),
    ("--weights random:mum_tiny --set key=teacher", "'key'"),
    ("--weights random:mum_tiny --set norm_eps=small", "norm_eps=small"),
    ("--weights random:mum_tiny --set num_heads=5", "num_heads 5"), ("--set depth", "KEY=VALUE"),
    ("--set device=cpu", "--device"), ("--set deepth=3", "'depth'"), ("--data nowhere", "'nowhere'"),
    ("--size 50", "patch size 16"), ("--every 0", "--every is 0"), ("--learning-rates -1", "--learning-rates are"),
    ("--batch 0", "--batch is 0"), ("--max-pairs 0", "--max-pairs is 0"), ("--temperature 0", "--temperature is 0"),
    ("--device tpu", "--device is 'tpu'"), ("--out small.pth", "--out 'small.pth'"),
]  # fmt: skip
ERRORS_OF_VIEWS = [
    ("--data nowhere", "'nowhere'"), ("--views 2 4", "--views are (2, 4)"), ("--views 1 16", "0 sequences"),
    ("--mask-ratio 1.5", "--mask-ratio is 1.5"), ("--mask-ratio 0.99", "mask_ratio is 0.99"),
    ("--gap 0", "--gap is 0"), ("--size 30", "patch size 16"),
]  # fmt: skip


def test_errors_are_one_line(weights, wall_file, rendered, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--weights", weights.name, "--out", "out", *QUICK]
    matching = ["matching", "--data", str(wall_file), *common, *PROBES]
    views = ["views", "--data", str(rendered), *common, "--views", "1", "2"]
    for base, errors in ((matching, ERRORS), (views, ERRORS_OF_VIEWS)):
        for words, message in errors:
            assert message in error_of(main([*base, *words.split()]), capsys)
    monkeypatch.setattr("fastmum.evaluate.__main__._run", Mock(side_effect=torch.OutOfMemoryError))
    for task in ("matching", "discriminant", "cosine", "attention", "views"):
        assert "lower --" in error_of(main([task, *common]), capsys)


def test_other_json_files_are_an_error(tmp_path, weights, wall_file, capsys):
    file, content = tmp_path / "out/other.json", result("mine")
    file.parent.mkdir()
    file.write_text("[]")
    assert "other.json'" in error_of(run("cosine", weights, wall_file, tmp_path / "out"), capsys)
    missing = [{k: v for k, v in content.items() if k != key} for key in content]
    for wrong in (*missing, content | {"scores": []}, content | {"weights": None}, content | {"task": "cooking"}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=r"other.json'"):
            read(file.parent)
    file.unlink()
    save(file.parent, result("mine", epe=1.0), [Image.new("RGB", (8, 8))])
    with pytest.raises(DataError, match="'mine' on 'wall'"):  # is no JSON, and leaves the pictures
        save(file.parent, result("mine", epe=float("nan")), [])
    (record,) = read(file.parent)
    assert (record.content["scores"], len(record.pictures)) == ({"epe": 1.0}, 1)


def result(weights, **scores):
    return {"task": "cosine", "set": "wall", "weights": weights, "scores": scores, "settings": {}}


def test_table_of_the_papers_sets(tmp_path):
    """Its numbers are next to results of its protocol; a result of the other one does not replace that."""
    content = result("ours", epe=12.34, pck5=None) | {"task": "matching", "set": "megadepth"}
    records = [save(tmp_path, content | {"protocol": name}, []) for name in ("matchbench", "patches")]
    assert [record.content["protocol"] for record in read(tmp_path)] == ["matchbench", "patches"]
    results = table(records)
    rows = [dict(zip(results.names, row, strict=True)) for row in results.rows if row[1] == "MegaDepth"]
    columns = "protocol", "EPE ↓", "PCK@5 ↑", "paper: MuM"
    found = [tuple(row[column] for column in columns) for row in rows]
    assert found == [("matchbench", "12.3", "–", "10.2"), ("patches", "12.3", "–", "–")]
