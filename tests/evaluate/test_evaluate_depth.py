"""Depth from weights to a page and to predictions: the command, the best head, frames that cannot be used, faults."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fastmum
from fastmum import PRESETS, ModelConfig, MuM
from fastmum.data.errors import DataError
from fastmum.evaluate import depth
from fastmum.evaluate.__main__ import main
from fastmum.evaluate.depth import DepthSettings, batches, evaluate_depth, open_cache, train_heads
from fastmum.evaluate.depth_sets import open_depth
from fastmum.model.encoder import Encoder
from fastmum.model.options import EncoderOptions
from fastmum.predict.__main__ import main as predict
from fastmum.scenes import ensure_scenes

QUICK = ["--steps", "3", "--batch", "4", "--learning-rates", "1e-3", "--weight-decays", "0.01", "--size", "48"]
ON_TEST = ["--choose-on", "test"]  # the scenes below are too few to leave some out


@pytest.fixture(scope="module")
def rendered():
    return ensure_scenes(count=4, views=12, size=64, seed=2025)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(1)
    torch.save(MuM(PRESETS["mum_tiny"]).state_dict(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_from_weights_to_depth_of_photographs(rendered, weights, tmp_path, capsys):
    out, cache = tmp_path / "out", tmp_path / "cache"
    words = ["--weights", weights, "--data", f"scenes:{rendered}", "--out", out, "--cache", cache, "--pictures", 2]
    assert main(["depth", *map(str, words), *QUICK, *ON_TEST, "--heads", "lin1", "lin4-nocls", "dinov3"]) == 0
    (result,) = out.glob("*.json")
    content = json.loads(result.read_text())
    assert (content["pairs"], content["settings"]["train_images"], content["settings"]["size"]) == (12, 36, 48)
    assert [head["head"] for head in content["heads"]] == ["lin1", "lin4-nocls", "dinov3"]
    best = min(content["heads"], key=lambda head: head["rmse"])
    assert content["best"]["head"] == best["head"]
    assert content["scores"]["rmse"] == best["rmse"]
    by_image = [image["rmse"] for image in content["per_image"].values()]
    assert content["scores"]["rmse"] == pytest.approx(np.mean(by_image))  # not the root of the mean
    assert "RMSE ↓" in (out / "table.md").read_text()
    assert len(list(out.glob("*.jpg"))) == 2
    assert len(list(cache.glob("*/*.safetensors"))) == 3 * 4 + 2 * 12  # training images once, test images both ways
    assert "paper" not in (out / "table.md").read_text().splitlines()[0]
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert all(f'data-name="head">{name}</td>' in page for name in content["by_head"])

    photographs = tmp_path / "photographs"
    photographs.mkdir()
    Image.effect_mandelbrot((70, 50), (-2, -1, 1, 1), 30).convert("RGB").save(photographs / "a.png")
    (photographs / "b.jpg").write_bytes(b"no image")
    assert predict([str(out), str(photographs), "--out", str(tmp_path / "found"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 images" in printed
    assert "b.jpg" in printed
    with Image.open(tmp_path / "found/depth/a.png.png") as file:
        found = np.asarray(file)
    assert (found.dtype, found.shape) == (np.uint16, (50, 70))
    assert 1 <= found.min() <= found.max() <= 15_000  # millimetres within the bins
    with Image.open(tmp_path / "found/colour/a.png.jpg") as file:
        assert file.size == (140, 50)
    (weights.parent / "moved").mkdir()
    moved = weights.rename(weights.parent / "moved/small.pth")
    words = [str(out), str(photographs), "--out", str(tmp_path / "found"), "--device", "cpu"]
    assert predict(words) == 2
    assert predict([*words, "--encoder", str(moved)]) == 0
    assert predict([*words, "--encoder", "random:mum_tiny"]) == 2
    assert "other weights" in capsys.readouterr().err


def test_every_head_has_its_published_rate_and_decay_by_default():
    defaults = DepthSettings()
    assert {(1e-4, 1e-2), (3e-4, 1e-4)} <= {*itertools.product(defaults.learning_rates, defaults.weight_decays)}


def test_training_lowers_the_error_and_seeds_repeat(rendered):
    encoder = fastmum.load_encoder("random:mum_tiny", patch_size=8)
    test, train = (open_depth(f"scenes:{rendered}", part).resized(48) for part in ("test", "train"))
    settings = DepthSettings(20, 6, ("lin4",), (1e-6, 1e-3, 1e30), (0.01,), versions=1)
    result = evaluate_depth(encoder, test, train, settings, False, most=6)
    untrained, trained, diverged = result.numbers["heads"]
    assert trained["rmse"] < 0.8 * untrained["rmse"]
    assert trained["train_loss"] < 0.9 * untrained["train_loss"]
    assert diverged["rmse"] is None or diverged["rmse"] > trained["rmse"]
    assert result.best.learning_rate == 1e-3
    short = [train_heads(encoder, train, replace(settings, steps=2))[1] for _ in range(2)]
    assert short[0] == short[1]


def test_heads_are_chosen_on_scenes_that_are_not_trained_on(rendered, tmp_path, monkeypatch):
    for i in range(9):
        shutil.copytree(rendered / f"scene_{i % 4:04d}", tmp_path / f"scene_{i:04d}")
    test, train = (open_depth(f"scenes:{tmp_path}", part).resized(48) for part in ("test", "train"))
    seen, score = [], depth.score_heads

    def scored(heads, encoder, data, frames, cache):
        """The first heads are best on the test images, the last ones on others."""
        seen.append({frame.key.partition("/")[0] for frame in frames})
        worth = range(len(heads)) if data is test else range(len(heads), 0, -1)
        (metrics,) = score(heads, encoder, data, frames[:1], cache).values()
        return {frames[0].key: [each | {"rmse": float(w)} for each, w in zip(metrics, worth, strict=True)]}

    monkeypatch.setattr(depth, "score_heads", scored)
    settings = DepthSettings(1, 2, ("lin1", "lin4"), (1e-3, 1e-2), (0.01,))
    for on_train, best, by_head in ((True, 3, [1, 3]), (False, 0, [0, 2])):
        found = evaluate_depth(fastmum.load_encoder("random:mum_tiny"), test, train, settings, on_train).numbers
        assert found["scores"]["rmse"] == found["heads"][best]["rmse"] == best
        assert [scores["rmse"] for scores in found["by_head"].values()] == by_head
        assert found["settings"]["train_images"] == 12 * (5 if on_train else 6)
    assert seen[1] == {"scene_0000"}


def test_heads_share_features_and_do_not_disturb_each_other(rendered, tmp_path, monkeypatch):
    encoder = fastmum.load_encoder("random:mum_tiny")
    data, calls = open_depth(f"scenes:{rendered}", "train").resized(48), []
    forward = encoder.tokens
    monkeypatch.setattr(
        encoder, "tokens", lambda images, *args, **more: calls.append(len(images)) or forward(images, *args, **more)
    )
    settings = DepthSettings(4, 6, ("lin1", "lin4"), (1e-3, 1e-2), (0.01,), versions=1)
    many, _ = train_heads(encoder, data, settings, open_cache(tmp_path, encoder))
    assert sum(calls) == 24  # 4 steps of 6 images
    (one,), _ = train_heads(
        encoder, data, DepthSettings(4, 6, ("lin4",), (1e-2,), (0.01,), versions=1), open_cache(tmp_path, encoder)
    )
    assert sum(calls) == 24  # all from the cache
    files = len(list(tmp_path.glob("*/*.safetensors")))
    train_heads(encoder, data, replace(settings, versions=0), open_cache(tmp_path, encoder))
    assert (sum(calls), len(list(tmp_path.glob("*/*.safetensors")))) == (48, files)  # new images are not kept
    torch.testing.assert_close(one.head.conv_depth.weight, many[3].head.conv_depth.weight)


def test_encoders_with_registers_and_without_cls(rendered):
    """DINOv3 has registers, CroCo has no CLS."""
    test, train = (open_depth(f"scenes:{rendered}", part).resized(48) for part in ("test", "train"))
    for options, heads in (({"registers": 4}, ("lin4", "dinov3")), ({"cls": False}, ("lin4-nocls",))):
        encoder = Encoder(ModelConfig(32, 2, 2, 32, 2, 2), EncoderOptions(**options)).eval()
        settings = DepthSettings(2, 4, heads, (1e-3,), (0.01,))
        result = evaluate_depth(encoder, test, train, settings, False, most=2)
        assert result.best.head.conv_depth.in_channels == 32 * (
            1 if result.best.name == "dinov3" else 2 * (1 + ("cls" not in options))
        )
    with pytest.raises(DataError, match="no CLS"):
        evaluate_depth(encoder, test, train, replace(settings, heads=("lin4",)), False)


def test_versions_repeat_and_new_ones_do_not(rendered):
    encoder, data = fastmum.load_encoder("random:mum_tiny"), open_depth(f"scenes:{rendered}", "train").resized(48)
    data.frames[:] = data.frames[:4]
    for versions, distinct in ((1, 4), (2, 8), (0, 12)):
        drawn = batches(data, DepthSettings(batch=4, versions=versions), encoder)
        seen = {image.numpy().tobytes() for _ in range(3) for image in next(drawn)[0]}
        assert abs(len(seen) - distinct) <= 1  # two versions may be the same image, unchanged


def test_frames_that_cannot_be_used_are_counted(rendered, tmp_path, monkeypatch):
    root = tmp_path / "scenes"
    shutil.copytree(rendered, root)
    encoder = fastmum.load_encoder("random:mum_tiny")
    test, train = (open_depth(f"scenes:{root}", part).resized(48) for part in ("test", "train"))
    for data in (test, train):
        first, second, third = data.frames[:3]
        Image.fromarray(np.zeros((64, 64), np.uint16)).save(first.depth)
        Image.fromarray(np.ones((32, 64), np.uint16)).save(second.depth)
        third.file.unlink()
    settings = DepthSettings(20, 4, ("lin1",), (1e-3,), (0.01,))
    numbers = evaluate_depth(encoder, test, train, settings, False).numbers
    assert (numbers["pairs"], numbers["set_pairs"]) == (9, 12)
    for data, part in ((test, "test"), (train, "train")):
        assert set(numbers["skipped"][part]) == {frame.key for frame in data.frames[:3]}
    test.frames[:], train.frames[:] = test.frames[:3], train.frames[:3]
    with pytest.raises(DataError, match="trained on"):
        train_heads(encoder, train, settings)
    train.frames[:] = open_depth(f"scenes:{root}", "train").frames[3:9]
    monkeypatch.setattr(depth, "train_heads", None)  # the error comes before
    with pytest.raises(DataError, match=rf"scored: {test.frames[0].key} \(.*\) and 2 more"):
        evaluate_depth(encoder, test, train, settings, False)


def test_errors_are_one_line(rendered, weights, tmp_path, refusal):
    common = ["depth", "--weights", weights, "--out", tmp_path / "out", *QUICK]
    scenes = f"scenes:{rendered}"
    for words, message in (
        (["--data", "nowhere"], "'nowhere'"), (["--data", f"nyu:{tmp_path}"], "nyu_test.txt"),
        (["--data", scenes, "--heads", "lin9"], "--heads"), (["--data", scenes, "--versions", -1], "--versions"),
        (["--data", scenes, "--train-data", scenes], "--choose-on test"),
        (["--data", scenes, "--train-data", f"scenes:{rendered / '.'}", "--learning-rates", 0], "--learning-rates"),
    ):  # fmt: skip
        assert message in refusal(main, *common, *words)
    shutil.copytree(rendered, tmp_path / "one")
    assert "no probe" not in refusal(predict, tmp_path / "one", rendered, "--out", tmp_path / "x")
