"""Results of several seeds as tables and pictures."""

import re

import pytest

from fastmum.evaluate import curves
from fastmum.evaluate.records import save
from fastmum.evaluate.results import group
from fastmum.evaluate.seeds import main


def matching(weights, epe, robustness=50.0):
    scores, still = {"epe": epe, "robustness": robustness}, {"epe": 70.0, "robustness": 20.0}
    return {"task": "matching", "set": "scenes", "weights": weights, "scores": scores, "no_motion": still}


def views(weights, same, other):
    scores = {f"views_{n}": loss for n, loss in zip((1, 2, 4), same, strict=True)}
    record = {"task": "views", "set": "scenes", "weights": weights, "scores": scores}
    return record | {"views": [1, 2, 4], "same": same, "other": other}


def encoder(weights, kind="timm", frames=None):
    return matching(weights, 50.0) | {"frames": frames, "encoder": {"kind": kind}}


def attention(weights, pairs):  # `pairs` were dropped from a result that has none
    record = {"task": "attention", "set": "scenes", "weights": weights, "pairs": 2, "scores": {"epe": 50.0}}
    return record | {"per_pair_epe": dict.fromkeys(pairs, 50.0)} if pairs else record


APART = (  # no seeds of one model
    encoder("vit_patch16_224"), encoder("vit_patch16_384"), encoder("vit-b-16"), encoder("vit-b-32"),
    encoder("run step_0002000", "mum", 2000), encoder("run step_0012500", "mum", 2500), encoder("mae 400"),
    encoder("mae 1600"), encoder("kinds 0", "croco"), encoder("kinds 1", "mae"), encoder("moments-0", "mum", 1),
    encoder("moments-1", "mum", 2), encoder("mum"),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for content in (
        matching("mum 0", 40.0), matching("mum 1", 44.0), matching("mae-v2 0", 60.0, None), matching("untrained", None),
        matching("mum 1", 30.0) | {"protocol": "matchbench"},
        views("mum 0", [0.8, 0.78, 0.76], [0.8, 0.81, 0.82]), views("mum 1", [0.9, 0.86, 0.84], [0.9, 0.90, 0.90]),
        {"task": "cosine", "set": "navi", "weights": "a 0", "scores": {"recall": 40.0}},
        *(attention(name, pairs) for name, pairs in (("mum 0", ()), ("mum 1", ("a/b", "a/c")))),
        *APART,
    ):  # fmt: skip
        save(tmp_path, content | {"settings": {}}, [])
    return tmp_path


def test_tables_and_pictures(folder, tmp_path, capsys):
    plots = tmp_path / "plots"
    assert main([str(folder), "--plots", str(plots)]) == 0
    printed = re.sub(" +", " ", capsys.readouterr().out)
    for row in (
        "mum (seeds) | 2 | 42.0 ± 2.8 | 50.0 ± 0.0",
        "mae-v2 0 | 1 | 60.0 | –",
        "untrained | 1 | – | 50.0",
        "mum 1 | 1 | 30.0 | 50.0",
        "no motion | | 70.0 | 20.0",
        "mum (seeds) | 2 | 42.0 ± 2.8 | 30.0 (1) | – | 50.0 ± 0.0 | 0.850 ± 0.071",
        "mum | 2 | 0.8500 ± 0.0707 | -0.0300 ± 0.0141 | -0.0500 ± 0.0141 | +0.0050 ± 0.0071 | +0.0100 ± 0.0141",
    ):
        assert f"| {row} |\n" in printed
    for each in APART:
        assert printed.count(f"| {each['weights']} | 1 | 50.0 |") == 2  # by evaluation, and in the table of all
    for name, text in (
        ("matching-scenes", "end-point error"),
        ("matching-scenes_matchbench", "end-point error"),
        ("views-scenes", "mum, with views of another scene"),
        ("cosine-navi", "recall, percent"),
    ):
        assert str(plots / f"{name}.svg") in printed
        assert text in (plots / f"{name}.svg").read_text()


def test_learning_curves(tmp_path, capsys):
    for frames, values in (
        (100, {"mum 0": 60.0, "mum 1": 64.0, "mae 0": 50.0}),
        (2000, {"mum 0": 40.0, "mum 1": 42.0}),
        (4000, {"mum 0": 30.0}),
    ):
        for name, epe in values.items():
            (tmp_path / str(frames)).mkdir(exist_ok=True)
            save(tmp_path / str(frames), matching(name, epe) | {"frames": frames, "settings": {}}, [])
    save(tmp_path / "2000", matching("of a file", 1.0) | {"settings": {}}, [])  # no number of frames
    plots = tmp_path / "plots"
    folders = [str(tmp_path / name) for name in ("100", "2000", "4000")]
    assert curves.main([*folders, "--plots", str(plots)]) == 0
    printed = re.sub(" +", " ", capsys.readouterr().out)
    for row in ("weights | 100 | 2,000 | 4,000", "mum | 62.0 ± 2.8 | 41.0 ± 1.4 | 30.0 (1)", "mae | 50.0 | – | –"):
        assert f"| {row} |\n" in printed
    assert "of a file" not in printed
    assert "frames seen" in (plots / "curve-matching-scenes.svg").read_text()
    assert curves.main([str(plots)]) == 2


def test_results_without_names_of_pairs_join_the_only_ones_of_that_number():
    a, b, unnamed = (attention(*each) | {"settings": {}} for each in (("a", "12"), ("b", "34"), ("c", "")))
    assert [each.contents for each in group([unnamed, a]) if each.contents] == [[unnamed, a]]
    assert [len(each.contents) for each in group([unnamed, a, b]) if each.contents] == [1, 1, 1]


def test_errors(folder, tmp_path, capsys):
    save(folder, matching("mum 2", 40.0) | {"settings": {"size": 64, "seed": 3}}, [])
    empty = tmp_path / "empty"
    for results, message in ((folder, "'mum 2' were evaluated with different size"), (empty, f"'{empty}'")):
        assert main([str(results)]) == 2
        assert message in capsys.readouterr().err
