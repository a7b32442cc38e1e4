"""Finding images, their sizes, and pictures of their tokens."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastmum.features import FeaturesError, Sizing, Tokens, find_images
from fastmum.features.images import Placement, read_image
from fastmum.features.pictures import _file_names, content, fit_colours


def test_sizes():
    for sizing, image, placed in (
        (Sizing(16), (48, 80), (48, 80, 48, 80)),
        (Sizing(16), (50, 90), (48, 96, 48, 96)),
        (Sizing(16), (3000, 4000), (768, 1024, 768, 1024)),
        (Sizing(16), (3, 3000), (16, 1024, 16, 1024)),
        (Sizing(8, max_side=0), (3001, 4000), (3000, 4000, 3000, 4000)),
        (Sizing(16, fit="pad"), (50, 90), (64, 96, 50, 90)),
        (Sizing(16, fit="pad"), (48, 80), (48, 80, 48, 80)),
        (Sizing(16, fit="pad"), (1, 3000), (16, 1024, 1, 1024)),
        (Sizing(16, (64, 64)), (50, 90), (64, 64, 64, 64)),
        (Sizing(16, (64, 64), "pad"), (50, 100), (64, 64, 32, 64)),
        (Sizing(16, (64, 64), "pad"), (1, 3000), (64, 64, 1, 64)),
    ):
        assert sizing.place(*image) == placed
    with pytest.raises(FeaturesError, match="250 x 256"):
        Sizing(16, (250, 256))
    with pytest.raises(FeaturesError, match="at most 10"):
        Sizing(16, max_side=10)


def names(*words):
    images = find_images(words)
    return [images.name(file) for file in images.files]


def test_folders_files_and_patterns(image_folder):
    scene = image_folder / "scene1"
    assert names(image_folder) == [f"scene{scene}/{view}.png" for scene in range(4) for view in range(6)]
    (scene / "notes.txt").touch()
    (scene / "depth").mkdir()
    shutil.copy(scene / "5.png", scene / "depth/5.png")
    assert names(str(scene)) == [f"{view}.png" for view in range(6)]
    pattern = names(str(image_folder / "scene[01]/[24].png"), image_folder / "scene0/2.png")
    assert pattern == ["scene0/2.png", "scene0/4.png", "scene1/2.png", "scene1/4.png"]
    assert len(names(str(image_folder / "**/5.png"))) == 5  # a pattern is not filtered
    assert len(names(str(image_folder / "scene[23]"))) == 12
    (scene / "0.png").rename(scene / "[1].png")
    assert names(scene / "[1].png") == ["[1].png"]  # a name first
    (image_folder / "empty").mkdir()
    for word in ("none", "*.jpg", "empty"):
        with pytest.raises(FeaturesError, match=re.escape(word)):
            find_images([image_folder / word])


def test_reading_turns_resizes_and_pads(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    images = find_images([tmp_path])
    (file,) = images.files
    assert images.sizes() == {file: (60, 40)}
    upright = np.rot90(pixels, -1)
    padded = read_image(file, Sizing(16, fit="pad").place(60, 40), mean=(0.2, 0.4, 0.6))
    expected = np.tile(np.array([51, 102, 153], np.uint8), (64, 48, 1))
    expected[:60, :40] = upright
    np.testing.assert_array_equal(padded, expected)
    resized = read_image(file, Sizing(16).place(60, 40)).astype(int)
    expected = np.asarray(Image.fromarray(upright).resize((32, 64), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(resized, expected, rtol=0, atol=1)


def test_the_main_directions_are_found_largest_first():
    torch.manual_seed(0)
    frame, _ = torch.linalg.qr(torch.randn(16, 16))
    strength = torch.tensor([9.0, 5.0, 3.0] + [0.01] * 13)
    tokens = (torch.randn(500, 16) * strength) @ frame.T + 7
    colours = fit_colours([tokens[:100], tokens[100:]])(tokens)
    for i in range(3):
        assert abs(np.corrcoef(colours[:, i], tokens @ frame[:, i])[0, 1]) > 0.97
    assert colours.dtype == np.uint8
    assert ((colours.min(0) == 0) & (colours.max(0) == 255)).all()
    mirrored = fit_colours([tokens.flip(0)])  # independent of the signs of the solver's vectors
    np.testing.assert_allclose(mirrored(tokens).astype(int), colours, atol=2)
    assert fit_colours([torch.ones(4, 8)])(torch.ones(2, 3, 8)).shape == (2, 3, 3)  # no direction at all


def test_padding_is_omitted_and_file_names_are_unique():
    tokens = Tokens(torch.zeros(2), torch.arange(12.0)[:, None].expand(12, 2), Placement(48, 64, 20, 50))
    assert content(tokens, 16)[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    layers = tokens._replace(patch=torch.stack([tokens.patch, tokens.patch + 100]))
    assert content(layers, 16)[0, 0, 0] == 100
    names = {"s/a.jpg": "s/a.jpg.png", "s/b.jpg": "s/b.png", "s/a.png": "s/a.png.png"}
    assert _file_names(names) == names
