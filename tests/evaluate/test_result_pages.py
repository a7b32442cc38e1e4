"""Folders of results: what can be compared, the page, and files that are damaged or of other tools."""

import copy
import json
import os
import random

import pytest
from browser import check_in_print, check_on_a_phone
from PIL import Image

from fastmum.evaluate.overview import distinct_names, overview
from fastmum.evaluate.records import read, save
from fastmum.evaluate.result_page import page
from fastmum.evaluate.results import table
from fastmum.evaluate.seeds import main

AUTHOR = {"protocol": "matchbench", "settings": {"size": 448}}


def result(task="cosine", name="scenes", weights="mine", pairs=4, size=128, epe=40.0, still=70.0, of=None):
    """A result of any evaluation with all its fields; the "views" of as many frames."""
    content = {"task": task, "set": name, "weights": weights, "settings": {"size": size}}
    if task == "views":
        content["settings"]["targets"] = pairs
        losses = {"views": [1, 2], "same": [0.8, 0.7], "other": [0.8, 0.9], "change_same": [[0.0, None], [-0.1, 0.01]]}
        return content | losses | {"scores": {"views_1": 0.8, "views_2": 0.7}, "per_sequence": {"a": {}}}
    scores = {"epe": epe, "robustness": 50.0, "pck1": 0.5, "pck3": 2.0, "pck5": None, "pairs": pairs}
    content |= {"scores": scores, "no_motion": scores | {"epe": still}, "pairs": pairs, "set_pairs": of or pairs}
    content["per_pair_epe"] = {f"{i}": epe for i in range(pairs)}
    evaluations = [{"step": step, "epe": epe, "train_loss": 1.0} for step in (10, 20)]
    probe = {"learning_rate": 0.1, "weight_decay": 0.0, "evaluations": evaluations}
    own = {
        "matching": {"best": {"learning_rate": 0.1, "weight_decay": 0.0, "step": 20}, "probes": [probe]},
        "cosine": {"best": "layernorm", "layernorm": {"scores": scores}, "prenorm": {"scores": scores}},
        "attention": {"best": "mean", "blocks": {"mean": scores, "0": scores}},
    }
    return content | own.get(task, {})


def cells(folder):
    """Rows of the table by matcher, set, pairs, size and weights."""
    found = table(read(folder))
    return {tuple(row[:5]): dict(zip(found.names, row, strict=True)) for row in found.rows}


def test_rows_of_other_pairs_are_another_set(tmp_path):
    for content in (
        result(weights="a"), result(weights="b", epe=30.0), result("attention"),
        result(weights="few", pairs=2, of=4, still=60.0), result(weights="small", size=64, still=50.0),
        result(weights="others", still=20.0) | {"per_pair_epe": dict.fromkeys("wxyz", 1.0)},
        result("matching", "megadepth", "all", 1000) | AUTHOR,
        result("matching", "megadepth", "part", 20, of=1000) | AUTHOR,
        result("matching", "megadepth", "old part", 30) | {"set_pairs": 30} | AUTHOR,
    ):  # fmt: skip
        save(tmp_path, content, [])
    rows = cells(tmp_path)
    still = {key[1:4]: row["EPE ↓"] for key, row in rows.items() if key[0] == "no motion"}
    assert {key: still[key] for key in still if "scenes" in key[0]} == {
        ("scenes", "4", "128"): "70.0", ("scenes", "2", "128"): "60.0", ("scenes", "4", "64"): "50.0",
        ("scenes (2)", "4", "128"): "20.0",
    }  # fmt: skip
    assert rows["cosine", "scenes (2)", "4", "128", "others"]["EPE ↓"] == "40.0"
    paper = {key[4]: row["paper: MuM"] for key, row in rows.items() if key[:2] == ("linear probe", "MegaDepth")}
    assert paper == {"all": "10.2", "part": "–", "old part": "–"}  # the paper's numbers belong to all pairs
    html = page(read(tmp_path))
    titles = "Cosine: scenes, 4 pairs, 128 × 128 px", "Cosine: scenes, 2 pairs", "Linear probe: MegaDepth, 1,000 pairs"
    assert [html.count(f"<h3>{title}") for title in titles] == [1, 1, 1]
    assert html.count("MuM (paper)") == 5  # both sets of linear probes, three of cosine matching


def test_published_poses_stand_next_to_all_pairs_of_megadepth(tmp_path):
    for weights, pairs in (("all", 1500), ("part", 1000)):
        content = {"task": "pose", "set": "megadepth", "weights": weights, "settings": {"size": 256}, "pairs": pairs}
        save(tmp_path, content | {"set_pairs": 1500, "scores": {"auc5": 20.0}}, [])
    rows = {key[2:5:2]: row["paper: MuM"] for key, row in cells(tmp_path).items()}
    assert rows == {("1,500", "all"): "26.7", ("1,000", "part"): "–"}
    whole, _ = overview(record.content for record in read(tmp_path) if record.content["weights"] == "all")
    assert ["MuM (paper)", "", "26.7"] in [row[:3] for row in whole.rows]


def test_weights_of_the_same_name_are_told_apart(tmp_path):
    for name in ("x/a/model.pth", "x/b/model.pth", "y/b/model.safetensors", "a.pth", "a.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    specs = [f"mae:{tmp_path}/x/a/model.pth", f"{tmp_path}/x/b/model.pth", f"{tmp_path}/y/b/model.safetensors"]
    files = [f"{tmp_path}/a.pth", f"{tmp_path}/a.safetensors"]
    runs = ["runs/mum-0/checkpoints", "runs/mum-1/checkpoints", "exp1/run", "exp2/run", "random:run"]
    assert distinct_names([*specs, *files, *runs]) == {
        **dict(zip(specs, ("x/a/model", "x/b/model", "y/b/model"), strict=True)),
        **dict(zip(files, ("a.pth", "a.safetensors"), strict=True)),
        "exp1/run": "exp1/run", "exp2/run": "exp2/run",
    }  # fmt: skip


def test_old_results_and_names_that_are_markup(tmp_path, capsys):
    new = {"pairs", "set_pairs", "per_pair_epe", "per_sequence", "no_motion", "probes", "best", "layernorm",
           "change_same"}  # fmt: skip
    for task in ("matching", "cosine", "attention", "views"):
        old = {key: value for key, value in result(task, weights="old 0").items() if key not in new}
        for content in (old, result(task, weights="old 1"), result(task, weights="<b> | $x_1$ \udce4")):
            content["settings"].pop("targets", None)
            save(tmp_path, content, [])
    (tmp_path / ".partial-7-cosine.json").write_text("{")
    (tmp_path / "._cosine.json").write_bytes(b"\0\5\x16\7")
    assert main([str(tmp_path), "--plots", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr().out + table(read(tmp_path)).markdown()
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert any("old | 2 | 40.0 ± 0.0" in line for line in lines)
    assert sum("\\| $x_1$ ?" in line for line in lines) == 9  # the last in the table of all
    assert "<b>" not in page(read(tmp_path))


def places(value, path=()):
    """Paths of all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*path, key)
        yield from places(each, (*path, key))


@pytest.mark.slow
def test_damaged_results_are_one_line_or_a_page(tmp_path, capsys):
    """Whatever is in the place of a value, its file is named, or all commands can show the result."""
    shown, draw = 0, random.Random(0)
    for task in ("matching", "cosine", "attention", "views"):
        file = save(tmp_path, result(task), []).file
        found = [(path, new) for path in places(result(task)) for new in (None, "x", -1, [], {}, 10**400, float("nan"))]
        for path, new in draw.sample(found, 40):
            content = copy.deepcopy(result(task))
            inner = content
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = new
            file.write_text(json.dumps(content))
            if main([str(tmp_path)]):
                error = capsys.readouterr().err
                assert file.name in error
                assert error.count("\n") == 1
            else:
                shown += 1
                records = read(tmp_path)
                table(records).markdown()
                page(records)
        file.unlink()
    assert shown > 10


def test_files_that_are_no_results(tmp_path, refusal):
    for content in (b"", b"[]", b"[" * 100_000, b'{"task": ["cosine"]}', b"\xff", b'{"task": "cosine"}', b"null"):
        (tmp_path / "other.json").write_bytes(content)
        assert "other.json" in refusal(main, tmp_path)
    (tmp_path / "other.json").unlink()
    os.mkfifo(tmp_path / "other.json")
    assert "other.json" in refusal(main, tmp_path)
    (tmp_path / "other.json").unlink()
    (tmp_path / "other.json").mkdir()
    assert "other.json" in refusal(main, tmp_path)
    (tmp_path / "other.json").rmdir()
    save(tmp_path, result(weights="../" + "a" * 300), [])
    (tmp_path / "file").touch()
    assert "--plots" in refusal(main, tmp_path, "--plots", tmp_path / "file")
    assert "nowhere" in refusal(main, tmp_path / "nowhere")


@pytest.mark.slow
def test_on_a_phone_and_in_print(tmp_path):
    for task in ("matching", "cosine", "attention", "views"):
        for weights in ("mine", "a_model_with_a_long_name_" * 3):
            save(tmp_path, result(task, weights=weights), [Image.new("RGB", (1804, 480))])
    recall = {f"recall{n}": 50.0 for n in ("", "_1cm", "_2cm", "_5cm")}
    save(tmp_path, result("cosine", "navi") | {"scores": recall}, [])
    file = tmp_path / "report.html"
    file.write_text(page(read(tmp_path)), encoding="utf-8")
    check_on_a_phone(file)
    check_in_print(file, ["PCK@5", "NAVI,", "(paper)", "px"])
