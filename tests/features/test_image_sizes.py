"""Finding images, their sizes, and pictures of their tokens."""

import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastmum.features import FeaturesError, Sizing, Tokens, find_images
from fastmum.features.images import PADDING, Placement, read_image
from fastmum.features.pictures import _file_names, content, fit_colours

SIDES = st.integers(1, 3000)


@given(
    SIDES, SIDES, st.sampled_from(["resize", "pad"]), st.sampled_from([8, 16]), st.sampled_from([0, 256, 1000]),
    st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
)  # fmt: skip
def test_sides_are_multiples_and_the_image_fits(height, width, fit, multiple, max_side, patches):
    size = patches and tuple(multiple * n for n in patches)
    placed = Sizing(multiple, size, fit, max_side).place(height, width)
    assert placed.height % multiple == 0 < placed.height
    assert placed.width % multiple == 0 < placed.width
    assert 1 <= placed.content_height <= placed.height
    assert 1 <= placed.content_width <= placed.width
    if size:
        assert placed[:2] == size
    if fit == "resize":
        assert placed[2:] == placed[:2]
    if not size and fit == "pad":  # no patch is only padding
        assert placed.height - placed.content_height < multiple
        assert placed.width - placed.content_width < multiple
    if not size and max_side:
        assert max(placed[:2]) < max_side + multiple


def test_examples():
    for sizing, image, placed in (
        (Sizing(16), (48, 80), (48, 80, 48, 80)),
        (Sizing(16), (50, 90), (48, 96, 48, 96)),
        (Sizing(16), (3000, 4000), (768, 1024, 768, 1024)),
        (Sizing(16, max_side=0), (3000, 4000), (3008, 4000, 3008, 4000)),
        (Sizing(16, fit="pad"), (50, 90), (64, 96, 50, 90)),
        (Sizing(16, fit="pad"), (48, 80), (48, 80, 48, 80)),
        (Sizing(16, (64, 64)), (50, 90), (64, 64, 64, 64)),
        (Sizing(16, (64, 64), "pad"), (50, 100), (64, 64, 32, 64)),
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
    assert names(image_folder) == [f"scene{scene}/{view}.png" for scene in range(4) for view in range(6)]
    (image_folder / "scene1/notes.txt").touch()
    (image_folder / "scene1/depth").mkdir()
    shutil.copy(image_folder / "scene1/5.png", image_folder / "scene1/depth/5.png")
    assert names(str(image_folder / "scene1")) == [f"{view}.png" for view in range(6)]
    pattern = names(str(image_folder / "scene[01]/[24].png"), image_folder / "scene0/2.png")
    assert pattern == ["scene0/2.png", "scene0/4.png", "scene1/2.png", "scene1/4.png"]
    assert len(names(str(image_folder / "**/5.png"))) == 5  # a pattern is not filtered
    assert len(names(str(image_folder / "scene[23]"))) == 12
    assert names(image_folder / "scene0/3.png") == ["3.png"]
    (image_folder / "scene0/0.png").rename(image_folder / "scene0/[1].png")
    assert names(image_folder / "scene0/[1].png") == ["[1].png"]  # a name first
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
    padded = read_image(file, Sizing(16, fit="pad").place(60, 40))
    assert padded.shape == (64, 48, 3)
    assert (padded[:60, :40] == upright).all()
    assert (padded[60:] == PADDING).all()
    assert (padded[:, 40:] == PADDING).all()
    resized = read_image(file, Sizing(16).place(60, 40)).astype(int)
    expected = np.asarray(Image.fromarray(upright).resize((48 - 16, 64), Image.Resampling.BICUBIC)).astype(int)
    assert resized.shape == expected.shape == (64, 32, 3)
    assert abs(resized - expected).max() <= 1


def test_the_main_directions_are_found_largest_first():
    torch.manual_seed(0)
    frame, _ = torch.linalg.qr(torch.randn(16, 16))
    strength = torch.tensor([9.0, 5.0, 3.0] + [0.01] * 13)
    tokens = (torch.randn(500, 16) * strength) @ frame.T + 7
    colours = fit_colours([tokens[:100], tokens[100:]])(tokens)
    for i in range(3):
        assert abs(np.corrcoef(colours[:, i], tokens @ frame[:, i])[0, 1]) > 0.97
    assert colours.dtype == np.uint8
    assert (colours.min(0) == 0).all()
    assert (colours.max(0) == 255).all()
    mirrored = fit_colours([tokens.flip(0)])  # independent of the signs of the solver's vectors
    np.testing.assert_allclose(mirrored(tokens).astype(int), colours, atol=2)
    assert fit_colours([torch.ones(4, 8)])(torch.ones(2, 3, 8)).shape == (2, 3, 3)  # no direction at all


def test_padding_is_omitted():
    tokens = Tokens(torch.zeros(2), torch.arange(12.0)[:, None].expand(12, 2), Placement(48, 64, 20, 50))
    assert content(tokens, 16)[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    layers = tokens._replace(patch=torch.stack([tokens.patch, tokens.patch + 100]))
    assert content(layers, 16)[0, 0, 0] == 100


def test_file_names_are_unique():
    names = {"s/a.jpg": "s/a.jpg.png", "s/b.jpg": "s/b.png", "s/a.png": "s/a.png.png"}
    assert _file_names(names) == names
