"""Finding images, and their sizes."""

import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastmum.data.decode.image import FrameError
from fastmum.features import FeaturesError, Sizing, find_images
from fastmum.features.images import PADDING, read_image

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


def test_folders_files_and_patterns(image_folder):
    whole = find_images([image_folder])
    names = [whole.name(file) for file in whole.files]
    assert names == [f"scene{scene}/{view}.png" for scene in range(4) for view in range(6)]
    (image_folder / "scene1/notes.txt").touch()
    (image_folder / "scene1/depth").mkdir()
    shutil.copy(image_folder / "scene1/5.png", image_folder / "scene1/depth/5.png")
    one = find_images([str(image_folder / "scene1")])
    assert [one.name(file) for file in one.files] == [f"{view}.png" for view in range(6)]
    pattern = find_images([str(image_folder / "scene[01]/[24].png"), image_folder / "scene0/2.png"])
    assert [pattern.name(file) for file in pattern.files] == [
        "scene0/2.png", "scene0/4.png", "scene1/2.png", "scene1/4.png",
    ]  # fmt: skip
    deep = find_images([str(image_folder / "**/5.png")])
    assert len(deep.files) == 5  # a pattern is not filtered
    folders = find_images([str(image_folder / "scene[23]")])
    assert len(folders.files) == 12
    single = find_images([image_folder / "scene0/3.png"])
    assert [single.name(file) for file in single.files] == ["3.png"]


def test_a_name_with_brackets_is_a_name_first(image_folder):
    (image_folder / "scene0/0.png").rename(image_folder / "scene0/[1].png")
    assert [file.name for file in find_images([image_folder / "scene0/[1].png"]).files] == ["[1].png"]
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


def test_unreadable_files_are_skipped(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.png").touch()
    images = find_images([tmp_path])
    assert images.sizes() == {}
    assert images.skipped == {"a.png": "not an image", "b.png": "empty"}
    with pytest.raises(FrameError, match="not an image"):
        read_image(tmp_path / "a.png", Sizing(16).place(32, 32))
