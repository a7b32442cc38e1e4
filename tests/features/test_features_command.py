"""`python -m fastmum.features`: tokens as the model computes them, files of both kinds, pictures, skipped images."""

import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fastmum import load_pretrained
from fastmum.features import FeaturesError, Sizing, extract, find_images, read_features, write_features
from fastmum.features.__main__ import main
from fastmum.features.memory import available_memory


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


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("batch", ["1", "2", "16"])
def test_tokens_of_images_of_their_own_size(mixed, weights, tiny, tmp_path, suffix, batch):
    out = tmp_path / f"new/features{suffix}"
    assert call(mixed, weights, out, "--batch", batch, "--no-pictures") == 0
    features, about = read_features(out)
    assert sorted(features) == [f"{i}.png" for i in range(5)]
    for name, tokens in features.items():
        ours = tiny.forward_features(pixels(mixed / name))
        torch.testing.assert_close(tokens.patch, ours["x_norm_patchtokens"][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tokens.cls, ours["x_norm_clstoken"][0], rtol=1e-5, atol=1e-5)
        assert tokens.placement[:2] == Image.open(mixed / name).size[::-1]
    assert about["layers"] == [1]
    assert about["skipped"] == {}


def test_files_are_plain_for_others(mixed, weights, tmp_path):
    for suffix in (".safetensors", ".npz"):
        assert call(mixed, weights, tmp_path / f"f{suffix}", "--no-pictures") == 0
    with np.load(tmp_path / "f.npz") as arrays, safe_open(tmp_path / "f.safetensors", "np") as file:
        assert arrays["3.png/patch"].shape == (16, 32)
        assert arrays["3.png/cls"].shape == (32,)
        for name in file.keys():  # noqa: SIM118 (not a dictionary)
            np.testing.assert_array_equal(arrays[name], file.get_tensor(name))
        assert json.loads(str(arrays["about"])) == json.loads(file.metadata()["about"])


@pytest.mark.parametrize(("words", "blocks"), [("2", [0, 1]), ("1", [1]), ("0,", [0]), ("1,0", [0, 1])])
@pytest.mark.parametrize("norm", [True, False])
def test_layers(mixed, weights, tiny, tmp_path, words, blocks, norm):
    options = ["--layers", words, "--no-pictures"] + ([] if norm else ["--no-norm"])
    assert call(mixed, weights, tmp_path / "f.npz", *options) == 0
    features, about = read_features(tmp_path / "f.npz")
    assert (about["layers"], about["norm"]) == (blocks, norm)
    ours = tiny.get_intermediate_layers(pixels(mixed / "1.png"), blocks, return_class_token=True, norm=norm)
    for i, (patch, cls) in enumerate(ours):
        torch.testing.assert_close(features["1.png"].patch[i], patch[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features["1.png"].cls[i], cls[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_bfloat16(mixed, weights, tiny, tmp_path, suffix):
    out = tmp_path / f"f{suffix}"
    assert call(mixed, weights, out, "--dtype", "bfloat16", "--no-pictures") == 0
    patch = read_features(out)[0]["3.png"].patch
    assert patch.dtype == {".safetensors": torch.bfloat16, ".npz": torch.float32}[suffix]
    ours = tiny.forward_features(pixels(mixed / "3.png"))["x_norm_patchtokens"][0]
    assert (patch.float() - ours).abs().max() < 0.1


def test_sizes_and_padding(image_folder, weights, tiny, tmp_path):  # images of 40 x 48
    scene = image_folder / "scene0"
    for options, tokens in ((["--size", "64"], 16), (["--size", "32x64"], 8), ([], 2 * 3), (["--fit", "pad"], 3 * 3)):
        assert call(scene, weights, tmp_path / "f.npz", *options, "--no-pictures", "--force") == 0
        features, _ = read_features(tmp_path / "f.npz")
        assert {t.patch.shape for t in features.values()} == {(tokens, 32)}
    padded = features["0.png"].placement
    assert padded == (48, 48, 40, 48)


def test_pictures_lie_beside_the_file_and_show_what_the_encoder_saw(image_folder, weights, tmp_path, capsys):
    assert call(image_folder, weights, tmp_path / "out/f.npz", "--fit", "pad") == 0
    folder = tmp_path / "out/f_pictures"
    assert f"pictures: {folder}" in capsys.readouterr().out
    assert len(list(folder.glob("scene*/*.png"))) == 24
    picture = np.asarray(Image.open(folder / "scene2/3.png"))
    assert picture.shape == (40, 48 + 4 + 48, 3)
    assert (picture[:, :48] == np.asarray(Image.open(image_folder / "scene2/3.png"))).all()
    colours = picture[:, 52:]
    assert (colours[:16, :16] == colours[0, 0]).all()  # a patch has one colour
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) > 4
    elsewhere = tmp_path / "elsewhere"
    assert call(image_folder / "scene0", weights, tmp_path / "g.npz", "--pictures", str(elsewhere)) == 0
    assert len(list(elsewhere.iterdir())) == 6


def test_images_that_cannot_be_read_are_skipped_counted_and_named(mixed, weights, tmp_path, capsys):
    (mixed / "0.png").write_bytes(b"no image")
    data = (mixed / "3.png").read_bytes()
    (mixed / "3.png").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2 - 12) + data[-12:])
    out = tmp_path / "f.npz"
    assert call(mixed, weights, out) == 0
    error = capsys.readouterr().err
    assert "skipped: 2 of 5 images" in error
    assert "  0.png: not an image" in error
    assert "  3.png: " in error
    features, about = read_features(out)
    assert sorted(features) == ["1.png", "2.png", "4.png"]
    assert sorted(about["skipped"]) == ["0.png", "3.png"]
    for file in mixed.iterdir():
        file.write_bytes(b"")
    assert call(mixed, weights, out, "--force") == 2
    assert capsys.readouterr().err.endswith("error: none of 5 images can be read; the first is '0.png' (empty)\n")
    assert read_features(out)[0].keys() == features.keys()  # what was there stays


def test_mistakes_are_one_line_before_work_is_done(mixed, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastmum.features.__main__.extract", None)  # nothing may come that far
    there = tmp_path / "there.npz"
    there.touch()
    for options, message in (
        (["--out", str(tmp_path / "f.pt")], "must end in .safetensors or .npz"),
        (["--out", str(there)], "is there already; --force replaces it"),
        (["--out", "/proc/none/f.npz"], "'/proc/none/f.npz' cannot be written (No such file or directory)"),
        (["--size", "250"], "the size is 250 x 250, but must be of multiples of 16"),
        (["--size", "big"], "--size is 'big', but must be native, a number of pixels, or HEIGHTxWIDTH"),
        (["--layers", "3"], "--layers is 3, but the encoder has 2 blocks: 1 to 2"),
        (["--layers", "0,2"], "--layers is 0,2, but the encoder's blocks are 0 to 1"),
        (["--layers", "last"], "--layers is 'last'"),
        (["--batch", "0"], "--batch 0"),
        (["--dtype", "int8"], "dtype is 'int8', but must be one of float32, bfloat16, float16"),
        (["--device", "nowhere"], "--device is 'nowhere', but must be auto, cpu, cuda or cuda:N"),
        (["--weights", str(tmp_path / "none")], "none' does not exist"),
        (["--set", "norm_esp=1"], "the nearest is 'norm_eps'"),
        (["--set", "norm_eps=[1"], "--set is 'norm_eps=[1', but the value cannot be read as YAML"),
        (["--set", "norm_eps=${"], "--set is 'norm_eps=${', but the value cannot be read as YAML"),
        (["--set", "norm_eps=[1]"], "norm_eps is [1], but must be a number between 0 and 1"),
        (["--set", "dtype=float16"], "--set is 'dtype=float16', but dtype has a flag of its own: --dtype"),
        (["--set", "norm_eps"], "--set is 'norm_eps', but must be KEY=VALUE"),
    ):
        assert call(mixed, weights, tmp_path / "f.npz", *options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1


def test_features_that_are_not_finite(mixed, tiny):
    with torch.no_grad():
        tiny.norm.bias[0] = torch.inf
    with pytest.raises(FeaturesError, match=r"features of '0.png' are not finite.*torch.float32 is too narrow"):
        extract(tiny, find_images([mixed]))


@pytest.mark.parametrize("options", [[], ["--layers", "2", "--dtype", "bfloat16"], ["--layers", "1,"]])
def test_features_that_do_not_fit_in_memory(mixed, weights, tmp_path, capsys, monkeypatch, options):
    """Told before anything is computed, and exactly."""
    out = tmp_path / "f.safetensors"
    assert call(mixed, weights, out, *options, "--no-pictures") == 0
    size = sum(part.nbytes for tokens in read_features(out)[0].values() for part in (tokens.cls, tokens.patch))
    module = importlib.import_module("fastmum.features.extract")  # the package has a function of that name
    monkeypatch.setattr(module, "available_memory", lambda: size)
    assert call(mixed, weights, out, *options, "--no-pictures", "--force") == 0
    monkeypatch.setattr(module, "available_memory", lambda: size - 1)
    monkeypatch.setattr(module, "read_image", None)  # nothing may come that far
    capsys.readouterr()
    assert call(mixed, weights, out, *options, "--no-pictures", "--force") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: features of 5 images take 0.0 GB, but 0.0 GB of memory are available: take a ")
    assert all(remedy in error for remedy in ("--size", "--dtype bfloat16", "fewer images"))


def test_memory_that_is_available(tmp_path, monkeypatch):
    assert available_memory() > 1e6
    there = tmp_path / "meminfo"
    there.write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:       7 kB\n")
    monkeypatch.setattr("fastmum.features.memory.MEMINFO", there)
    assert available_memory() == 7 * 1024
    there.unlink()
    assert available_memory() > 1e6


def test_from_python(mixed, weights, tmp_path):
    images = find_images([mixed])
    features = extract(load_pretrained(weights), images, Sizing(16, (32, 32)), layers=[0, 1], batch=2)
    assert list(features) == [f"{i}.png" for i in range(5)]  # in the order of the files, not of the batches
    assert features["2.png"].patch.shape == (2, 4, 32)
    write_features(tmp_path / "f.safetensors", features, {"mine": 1})
    again, about = read_features(tmp_path / "f.safetensors")
    assert about == {"mine": 1}
    assert torch.equal(again["4.png"].patch, features["4.png"].patch)
    for content in (b"", b"something else", b"PK\x03\x04 and nothing more"):
        (tmp_path / "f.npz").write_bytes(content)
        with pytest.raises(FeaturesError, match=r"f.npz' holds no features"):
            read_features(tmp_path / "f.npz")
