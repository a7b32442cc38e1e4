"""The evaluations of recognition and segmentation, and the table of all, from weights to a page."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from fastmum import ModelConfig, MuM
from fastmum.evaluate import evaluate_cosine, recognition
from fastmum.evaluate.__main__ import main
from fastmum.evaluate.commands import EVALUATIONS
from fastmum.evaluate.images import open_images
from fastmum.evaluate.overview import overview
from fastmum.evaluate.recognition import evaluate_recognition, split, split_by_class
from fastmum.evaluate.records import read, save
from fastmum.features import FeatureCache
from fastmum.tasks.recognition.probes import ClassifierSettings

CLASSES = "blue", "green", "red"
QUICK = ["--size", "32", "--device", "cpu"]
PROBES = ["--steps", "24", "--batch", "12", "--learning-rates", "1e-3", "1e-2", "1e-1", "--weight-decays", "0"]


def encoder():
    torch.manual_seed(0)
    return MuM(ModelConfig(64, 2, 1, 32, 2, 2)).eval()


def noisy(rng, colour, size=(40, 36)):
    pixels = rng.integers(0, 80, (*size[::-1], 3))
    pixels[..., colour] += 150
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def weights(tmp_path):
    torch.save(encoder().state_dict(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


@pytest.fixture
def folder(tmp_path):
    """Images that are blue, green or red, in class folders."""
    rng, root = np.random.default_rng(0), tmp_path / "colours"
    for part, count in (("train", 8), ("val", 4)):
        for i, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                noisy(rng, 2 - i).save(root / part / name / f"{k}.png")
    return root


@pytest.fixture
def ade(tmp_path):
    """Images whose left part has another colour and label than the right one; 0 and 255 at the borders."""
    rng, root = np.random.default_rng(0), tmp_path / "ADEChallengeData2016"
    for part, count in (("training", 20), ("validation", 4)):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for k in range(count):
            a, b = rng.permutation(3)[:2]
            image, label = np.array(noisy(rng, a)), np.full((36, 40), a + 1, np.uint8)
            at = int(rng.integers(14, 26))
            image[:, at:], label[:, at:] = np.array(noisy(rng, b))[:, at:], b + 1
            label[:4], label[-4:] = 0, 255
            Image.fromarray(image).save(root / f"images/{part}/{k}.jpg", quality=95)
            Image.fromarray(label).save(root / f"annotations/{part}/{k}.png")
    return root


def run(task, data, out, *words):
    return main([task, "--data", str(data), "--out", str(out), *QUICK, *map(str, words)])


def test_probes_find_the_colour(folder, weights, tmp_path, monkeypatch, capsys):
    out, cache = tmp_path / "out", tmp_path / "cache"
    words = ["--weights", weights, *PROBES, "--cache", cache, "--pictures", 2]
    assert run("recognition", folder, out, *words) == 0
    (record,) = read(out)
    content, scores = record.content, record.content["scores"]
    assert set(scores) == {"top1_patch", "top1_cls", "top1_avg_patch", "top1_cls_avg_patch"}
    assert max(scores.values()) == 100
    assert (content["pairs"], content["set"], content["skipped"]) == (12, "colours (folder)", {})
    assert len(content["heads"]) == 4 * 3
    assert content["settings"]["validation_images"] == 2  # a tenth of 24
    for source, chosen in content["best"].items():
        own = [each for each in content["heads"] if each["source"] == source]
        best = max(own, key=lambda each: each["top1_validation"])
        assert chosen == f"{best['learning_rate']:g}, {best['weight_decay']:g}"
    assert len(record.pictures) == 1
    page = (out / "report.html").read_text()
    assert "top-1 attentive" in page
    files = [*cache.glob("*/*.safetensors")]
    assert len(files) == 2 * 22 + 2 + 12  # two crops of the training images
    monkeypatch.setattr("fastmum.tasks.recognition.features.Encoder.tokens", None)
    assert run("recognition", folder, tmp_path / "again", *words[:-1], 0) == 0  # no feature is computed
    assert read(tmp_path / "again")[0].content["heads"] == content["heads"]
    capsys.readouterr()


def test_faults_are_counted(folder, weights, tmp_path, capsys, monkeypatch):
    (folder / "train/red/0.png").write_bytes(b"no image")
    (folder / "val/red/1.png").write_bytes((folder / "val/red/1.png").read_bytes()[:500])
    labels = {f"{name}/{k}.png": name for name in CLASSES for k in range(3)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    words = ["--weights", weights, *PROBES, "--steps", 4, "--crops", 1, "--labels", tmp_path / "labels.json"]
    assert run("recognition", folder, tmp_path / "out", *words) == 0
    (record,) = read(tmp_path / "out")
    assert record.content["pairs"] == 12 - 3 - 1  # three without a label, one is damaged
    assert record.content["not_scored"] == 4
    assert record.content["set"] == "colours (folder) (labels)", "a result of other labels is another one"
    (tmp_path / "others.json").write_text(json.dumps({"x.png": CLASSES[0]}))
    printed = capsys.readouterr().err
    assert set(record.content["skipped"]) == {str(folder / name) for name in ("train/red/0.png", "val/red/1.png")}
    assert all(f"{name} ({why})" in printed for name, why in record.content["skipped"].items())
    narrow = ["--weights", "random:mum_tiny", "--set", "embed_dim=96"]
    assert run("recognition", folder, tmp_path / "out", *words, *narrow) == 2
    assert "multiple of 64" in capsys.readouterr().err
    for file in folder.glob("val/*/*.png"):
        file.write_bytes(b"")
    monkeypatch.setattr("fastmum.tasks.recognition.features.Encoder.tokens", None)  # errors come before the training
    for change, text in (
        ([], "0.png (empty) and 8 more"), (["--labels", tmp_path / "none.json"], "none.json"),
        (["--labels", tmp_path / "others.json"], "no label of a test image"),
        (["--size", 40], "--size is 40"), (["--steps", 1], "--steps is 1"), (["--crops", -1], "--crops is -1"),
        (["--weight-decays", -1], "--weight-decays are"), (["--data", "cars:/x"], "cars"),
    ):  # fmt: skip
        assert run("recognition", folder, tmp_path / "out", *words, *change) == 2
        assert text in capsys.readouterr().err.strip().splitlines()[-1]


def test_new_crops_each_time_are_not_kept(folder, tmp_path, monkeypatch):
    """As CAPI: no crop comes twice; an encoder without CLS has two sources."""
    seen = []
    stream = recognition.stream

    def watched(encoder, batches, cache, skipped):
        for batch in batches:
            seen.append([view.name for view in batch])
            yield from (each._replace(cls=None) for each in stream(encoder, [batch], cache, skipped))

    monkeypatch.setattr(recognition, "stream", watched)
    settings = ClassifierSettings(steps=6, batch=22, learning_rates=(1e-3,), weight_decays=(0.0,))
    found = evaluate_recognition(encoder(), open_images(str(folder)), settings, 32, cache=tmp_path / "cache")
    names = [name for batch in seen[:6] for name in batch]
    assert len(set(names)) == len(names) == 132
    assert set(found.numbers["scores"]) == {"top1_patch", "top1_avg_patch"}
    assert len([*(tmp_path / "cache").glob("*/*.safetensors")]) == 2 + 12


def test_groups_are_not_split():
    train, validation = split([f"scene {i // 4}" for i in range(80)], "images")
    assert sorted(train + validation) == [*range(80)]
    assert {i // 4 for i in train}.isdisjoint({i // 4 for i in validation})
    order = np.random.default_rng(42).permutation(50).tolist()  # eval_classification.py
    assert split([*map(str, range(50))], "images") == (order[:45], order[45:])
    order = np.random.RandomState(0).permutation(57).tolist()  # eval_segmentation.py
    assert split([*map(str, range(57))], "maps") == (order[5:], order[:5])


def test_every_class_with_two_groups_is_in_validation():
    groups, labels = [f"room {i // 4}" for i in range(96)], [((i // 4) % 3 // 2,) for i in range(92)] + [(7,)] * 4
    train, validation = split_by_class(groups, labels)
    assert sorted(train + validation) == [*range(96)]
    assert [*{groups[i]: labels[i] for i in validation}.values()] == [(0,), (0,), (1,)]  # of 16, 7 and 1 rooms
    assert len(validation) == 12
    assert split_by_class(groups[:8], [(0,)] * 4 + [(1,)] * 4) == split(groups[:8], "images")


def test_segmentation_finds_the_colours(ade, weights, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    (ade / "annotations/validation/3.png").unlink()
    assert run("segmentation", f"ade20k:{ade}", tmp_path / "out", "--weights", weights, "--pictures", 1) == 0
    (record,) = read(tmp_path / "out")
    scores = record.content["scores"]
    assert scores["knn_miou"] > 30
    assert scores["logreg_miou"] > 50
    assert scores["logreg_ignored"] == 0
    assert (record.content["pairs"], record.content["set_pairs"]) == (3, 4)
    assert record.content["skipped"] == {str(ade / "images/validation/3.jpg"): "it has no labels"}
    assert len(record.content["validation"]["knn"]) == 8
    assert len(record.pictures) == 1
    assert "3.jpg (it has no labels)" in capsys.readouterr().err
    assert run("segmentation", f"ade20k:{ade}", tmp_path / "out", "--weights", weights, "--train-images", 1) == 2
    assert "--train-images is 1" in capsys.readouterr().err
    hidden = (ade / "annotations/validation").rename(tmp_path / "hidden")
    with monkeypatch.context() as patch:  # nothing is encoded for a test that cannot be done
        patch.setattr("fastmum.tasks.recognition.features.Encoder.tokens", None)
        assert run("segmentation", f"ade20k:{ade}", tmp_path / "out", "--weights", weights) == 2
    assert "0.jpg (it has no labels) and 3 more" in capsys.readouterr().err
    hidden.rename(ade / "annotations/validation")
    for file in ade.glob("annotations/training/*.png"):
        Image.new("L", (40, 36), 255).save(file)
    assert run("segmentation", f"ade20k:{ade}", tmp_path / "out", "--weights", weights) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: every patch to train on")


def test_all_evaluations_of_two_encoders_on_one_page(folder, weights, wall_file, tmp_path, capsys):
    out, options = tmp_path / "all", "recognition=--steps 4 --batch 8 --learning-rates 1e-3 --weight-decays 0 --crops 1"
    words = ["--weights", weights, "random:mum_tiny", tmp_path / "none.pth", "--tasks", "cosine", "recognition"]
    words += ["--data", folder, wall_file, "--seeds", 2, "--pictures", 0, "--size", 32, "--device", "cpu"]
    words += ["--options", options, "--out", out]
    assert main(["all", *map(str, words)]) == 0
    records = read(out)
    by_task = sorted((r.content["task"], r.content["weights"]) for r in records)  # each takes one of the sets
    names = ["small 0", "small 1", "untrained mum_tiny 0", "untrained mum_tiny 1"]
    assert by_task == [("cosine", n) for n in names if n != "small 1"] + [("recognition", n) for n in names]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (out / "overview.md").read_text().splitlines()
    ]
    header, rows = lines[0], [line for line in lines[2:] if line]
    assert [title.partition(":")[2] for title in header[2:]] == [" EPE ↓", " top-1 attentive ↑"]
    assert [row[:2] for row in rows] == [["small", "2"], ["untrained mum_tiny", "2"]]
    epe = [r.content["scores"]["epe"] for r in records if r.content["task"] == "cosine"]
    assert rows[0][2] == f"{epe[0]:.1f} (1)"  # without a spread: it does not depend on the seed
    assert rows[1][2] == f"{np.mean(epe[1:]):.1f} ± {np.std(epe[1:], ddof=1):.1f}"
    page, printed = (out / "report.html").read_text(), capsys.readouterr().out
    for text in (page, printed, (out / "overview.md").read_text()):
        assert "none.pth" in text
    assert run("cosine", wall_file, out, "--weights", weights, "--name", "later", "--size", 32, "--pictures", 0) == 0
    assert all(text in (out / "overview.md").read_text() for text in ("later", "none.pth"))
    assert "top-1" in (out / "report.html").read_text().partition("<table")[2].partition("</table>")[0], "the overview"
    assert main(["all", "--weights", str(tmp_path / "none.pth"), "--tasks", "cosine", "--out", str(out)]) == 2
    assert "no evaluation could be run" in capsys.readouterr().err
    assert main(["all", "--weights", str(weights), "--options", "cooking=--hot", "--out", str(out)]) == 2


def test_a_fault_of_one_evaluation_leaves_the_others(wall_file, tmp_path, monkeypatch, caplog):
    words = ["--weights", "random:mum_tiny", "--tasks", "attention", "cosine", "--data", wall_file, "--out", tmp_path]
    run_all = [*map(str, ["all", *words, "--pictures", 0, *QUICK])]
    monkeypatch.setattr("fastmum.evaluate.commands.evaluate_attention", Mock(side_effect=IndexError("row 7\nof 3")))
    assert main(run_all) == 0
    assert [record.content["task"] for record in read(tmp_path)] == ["cosine"]
    for file in ("overview.md", "report.html"):
        (note,) = [line for line in (tmp_path / file).read_text().splitlines() if "Not run" in line]
        assert "IndexError: row 7" in note
    assert "Traceback" in caplog.text
    monkeypatch.setattr("fastmum.evaluate.commands.evaluate_attention", Mock(side_effect=KeyboardInterrupt))
    assert main(run_all) == 130
    # Also the only evaluation is not lost because its second seed fails.
    cosine = Mock(side_effect=[evaluate_cosine, ZeroDivisionError("seed 1")])
    monkeypatch.setattr("fastmum.evaluate.commands.evaluate_cosine", lambda *args, **more: cosine()(*args, **more))
    only = [str(tmp_path / "seeds") if word == str(tmp_path) else word for word in run_all if word != "attention"]
    assert main([*only, "--seeds", "2"]) == 0
    assert "ZeroDivisionError" in (tmp_path / "seeds/overview.md").read_text()


def test_overview_has_the_papers_numbers_for_the_same_protocol(tmp_path):
    def result(task, name, weights, pairs, of, **scores):
        content = {"task": task, "set": name, "weights": weights, "settings": {"size": 448}, "protocol": "matchbench"}
        save(tmp_path, content | {"scores": scores, "pairs": pairs, "set_pairs": of}, [])

    for i, epe in enumerate((10.0, 12.0)):
        result("matching", "megadepth", f"mum-{i}", 1000, 1000, epe=epe)
    result("matching", "scannet", "mum-0", 20, 1500, epe=7.0)  # not the whole set
    result("segmentation", "ade20k", "other", 2000, 2000, knn_miou=20.0, logreg_miou=None)
    found, notes = overview(record.content for record in read(tmp_path))
    rows = {row[0]: row[2:] for row in found.rows}
    assert found.names[2].startswith("linear probe by matchbench, MegaDepth (1,000")
    assert notes == []
    assert rows["mum"] == ["11.0 ± 1.4", "7.0 (1)", "–"]
    assert rows["other"] == ["–", "–", "20.0"]
    assert rows["MuM (paper)"] == ["10.2", "–", "–"]
    assert rows["CroCo v2 (paper)"] == ["27.3", "–", "–"]
    assert set(EVALUATIONS) >= {"recognition", "segmentation"}
    for record in read(tmp_path):  # the protocol has 448 px
        content = record.content | {"settings": {"size": 224}}
        record.file.write_text(json.dumps(content))
    assert "MuM (paper)" not in {row[0] for row in overview(record.content for record in read(tmp_path))[0].rows}


def test_a_damaged_feature_is_computed_again(folder, tmp_path):
    cache, images = tmp_path / "cache", open_images(str(folder))
    settings = ClassifierSettings(steps=4, batch=8, learning_rates=(1e-2,), weight_decays=(0.0,))
    first = evaluate_recognition(encoder(), images, settings, 32, 1, cache=cache)
    for file in cache.glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    assert evaluate_recognition(encoder(), images, settings, 32, 1, cache=cache).numbers == first.numbers
    assert FeatureCache(cache, encoder(), {"task": "other"}).folder != next(cache.iterdir())
