"""`python -m fastmum.features`: tokens as the model computes them, both file formats, pictures, skipped images."""

import importlib
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from fastmum import load_pretrained
from fastmum.features import FeaturesError, Sizing, extract, find_images, read_features, write_features
from fastmum.features.__main__ import main

EXTRACT = importlib.import_module("fastmum.features.extract")  # the package has a function of that name


@pytest.fixture
def weights(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def mixed(tmp_path):
    """Images of three sizes that the patch size divides."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(32, 48), (48, 32), (32, 48), (64, 64), (32, 48)]):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def pixels(file):
    return torch.from_numpy(np.array(Image.open(file)))[None]


def call(images, weights, out, *options):
    return main([str(images), "--weights", str(weights), "--out", str(out), *options])


@pytest.mark.parametrize(("suffix", "batch"), [(".safetensors", 1), (".npz", 2), (".safetensors", 16)])
def test_tokens_of_images_of_their_own_size(mixed, weights, tiny, tmp_path, suffix, batch):
    out = tmp_path / f"new/features{suffix}"
    assert call(mixed, weights, out, "--batch", str(batch), "--no-pictures") == 0
    features, about = read_features(out)
    assert sorted(features) == [f"{i}.png" for i in range(5)]
    for name, tokens in features.items():
        ours = tiny.forward_features(pixels(mixed / name))
        torch.testing.assert_close(tokens.patch, ours["x_norm_patchtokens"][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tokens.cls, ours["x_norm_clstoken"][0], rtol=1e-5, atol=1e-5)
        assert tokens.placement[:2] == Image.open(mixed / name).size[::-1]
    assert about["layers"] == [1]
    assert about["skipped"] == {}
    plain = dict(np.load(out)) if suffix == ".npz" else load_file(out)  # for other readers
    assert (plain["3.png/patch"].shape, plain["3.png/cls"].shape) == ((16, 32), (32,))


@pytest.mark.parametrize(
    ("words", "blocks", "norm"), [("2", [0, 1], True), ("1", [1], False), ("0,", [0], True), ("1,0", [0, 1], False)]
)
def test_layers(mixed, weights, tiny, tmp_path, words, blocks, norm):
    options = ["--layers", words, "--no-pictures"] + ([] if norm else ["--no-norm"])
    assert call(mixed, weights, tmp_path / "f.npz", *options) == 0
    features, about = read_features(tmp_path / "f.npz")
    assert (about["layers"], about["norm"]) == (blocks, norm)
    ours = tiny.get_intermediate_layers(pixels(mixed / "1.png"), blocks, return_class_token=True, norm=norm)
    for i, (patch, cls) in enumerate(ours):
        torch.testing.assert_close(features["1.png"].patch[i], patch[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features["1.png"].cls[i], cls[0], rtol=1e-5, atol=1e-5)


def test_sizes_and_padding(image_folder, weights, tiny, tmp_path):  # images of 40 x 48
    scene = image_folder / "scene0"
    for options, tokens in ((["--size", "64"], 16), (["--size", "32x64"], 8), ([], 2 * 3), (["--fit", "pad"], 3 * 3)):
        assert call(scene, weights, tmp_path / "f.npz", *options, "--no-pictures", "--force") == 0
        features, _ = read_features(tmp_path / "f.npz")
        assert {t.patch.shape for t in features.values()} == {(tokens, 32)}
    assert features["0.png"].placement == (48, 48, 40, 48)


def test_pictures_show_the_input_and_its_tokens(image_folder, weights, tmp_path, capsys):
    folder = tmp_path / "elsewhere"
    assert call(image_folder, weights, tmp_path / "out/f.npz", "--fit", "pad", "--pictures", str(folder)) == 0
    assert f"pictures: {folder}" in capsys.readouterr().out
    assert len(list(folder.glob("scene*/*.png"))) == 24
    picture = np.asarray(Image.open(folder / "scene2/3.png"))
    assert picture.shape == (40, 48 + 4 + 48, 3)
    assert (picture[:, :48] == np.asarray(Image.open(image_folder / "scene2/3.png"))).all()
    colours = picture[:, 52:]
    assert (colours[:16, :16] == colours[0, 0]).all()  # a patch has one colour
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) > 4


def test_images_that_cannot_be_read_are_skipped_counted_and_named(mixed, weights, tmp_path, capsys):
    (mixed / "0.png").write_bytes(b"no image")
    data = (mixed / "3.png").read_bytes()
    (mixed / "3.png").write_bytes(data[:-2000] + bytes(1988) + data[-12:])
    out = tmp_path / "f.npz"
    assert call(mixed, weights, out) == 0
    assert (tmp_path / "f_pictures/1.png").exists()
    error = capsys.readouterr().err
    assert all(words in error for words in ("skipped: 2 of 5 images", "  0.png: not an image", "  3.png: "))
    features, about = read_features(out)
    assert sorted(features) == ["1.png", "2.png", "4.png"]
    assert sorted(about["skipped"]) == ["0.png", "3.png"]
    for file in mixed.iterdir():
        file.write_bytes(b"")
    assert call(mixed, weights, out, "--force") == 2
    assert "'0.png' (empty)" in capsys.readouterr().err.splitlines()[-1]
    assert read_features(out)[0].keys() == features.keys()  # the existing file is kept


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_names_that_are_not_utf_8_are_escaped(mixed, weights, tmp_path, capsys, suffix):
    os.rename(mixed / "0.png", os.fsencode(mixed) + b"/caf\xe9.png")
    os.rename(mixed, folder := os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    out = tmp_path / f"f{suffix}"
    assert call(folder, weights, out) == 0
    assert sorted(read_features(out)[0]) == ["1.png", "2.png", "3.png", "4.png", r"caf\xe9.png"]
    assert (out.parent / r"f_pictures/caf\xe9.png").exists()
    assert "5 images" in capsys.readouterr().out


def test_mistakes_are_one_line_before_work_is_done(mixed, weights, tmp_path, refusal, monkeypatch):
    monkeypatch.setattr("fastmum.features.__main__.extract", None)  # must not be reached
    there = tmp_path / "there.npz"
    there.touch()
    for options, message in (
        (["--out", tmp_path / "f.pt"], ".safetensors or .npz"),
        (["--out", there], "--force"),
        (["--out", "/proc/none/f.npz"], "'/proc/none/f.npz'"),
        (["--size", "250"], "250 x 250"),
        (["--size", "big"], "--size is 'big'"),
        (["--layers", "3"], "1 to 2"),
        (["--layers", "0,2"], "0 to 1"),
        (["--batch", "0"], "--batch 0"),
        (["--device", "nowhere"], "--device is 'nowhere'"),
        (["--set", "norm_eps=${"], "norm_eps is '${'"),
        (["--set", "dtype=float16"], "--dtype"),
        (["--set", "norm_eps"], "KEY=VALUE"),
    ):
        assert message in refusal(main, mixed, "--weights", weights, "--out", tmp_path / "f.npz", *options)


@pytest.mark.parametrize("options", [["--layers", "2", "--dtype", "bfloat16"], ["--layers", "1,"]])
def test_features_that_do_not_fit_in_memory(mixed, weights, tiny, tmp_path, capsys, monkeypatch, options):
    """The estimate is exact, and raises before anything is computed."""
    out, ours = tmp_path / "f.safetensors", tiny.forward_features(pixels(mixed / "3.png"))["x_norm_patchtokens"][0]
    options = [*options, "--no-pictures", "--force"]
    assert call(mixed, weights, out, *options) == 0
    features, _ = read_features(out)
    patch = features["3.png"].patch[-1]
    assert patch.dtype == (torch.bfloat16 if "bfloat16" in options else torch.float32)
    assert (patch.float() - ours).abs().max() < 0.1
    write_features(tmp_path / "f.npz", features, {})
    assert torch.equal(read_features(tmp_path / "f.npz")[0]["3.png"].patch[-1], patch.float())
    size = sum(part.nbytes for tokens in features.values() for part in (tokens.cls, tokens.patch))
    monkeypatch.setattr(EXTRACT, "available_memory", lambda: size)
    assert call(mixed, weights, out, *options) == 0
    monkeypatch.setattr(EXTRACT, "available_memory", lambda: size - 1)
    monkeypatch.setattr(EXTRACT, "read_image", None)  # must not be reached
    assert call(mixed, weights, out, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in ("5 images", "--size", "--dtype bfloat16"))


def test_available_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(EXTRACT, "MEMINFO", tmp_path / "meminfo")
    assert EXTRACT.available_memory() > 1e6
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:       7 kB\n")
    assert EXTRACT.available_memory() == 7 * 1024


def test_from_python(mixed, weights, tmp_path):
    model, images = load_pretrained(weights), find_images([mixed])
    features = extract(model, images, Sizing(16, (32, 32)), layers=[0, 1], batch=2)
    assert list(features) == [f"{i}.png" for i in range(5)]  # in the order of the files, not of the batches
    assert features["2.png"].patch.shape == (2, 4, 32)
    for content in (b"", b"something else", b"PK\x03\x04 and nothing more"):
        (tmp_path / "f.npz").write_bytes(content)
        with pytest.raises(FeaturesError, match=r"f.npz' holds no features"):
            read_features(tmp_path / "f.npz")
    torch.nn.init.constant_(model.norm.bias, torch.inf)
    with pytest.raises(FeaturesError, match=r"'0.png' are not finite.*float32"):
        extract(model, images)
