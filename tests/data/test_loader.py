"""Decoding frames: geometry, file kinds, broken files, order and waiting."""

import logging
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastmum.data.decode import Decoder, read_image
from fastmum.data.loader import Loader
from fastmum.data.plan import Crop, StepPlan, StepPlanner, whole_frame
from fastmum.data.sequences import DataError, find_sequences


def gradient(width=40, height=30):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def box_crop(box_share, corner, flip=False):
    return Crop(np.array([box_share]), np.array([1.0]), np.array(corner), flip)


def test_a_crop_shows_its_part_of_the_image(tmp_path):
    gradient(64, 64).save(tmp_path / "a.png")
    decoder = Decoder(16)
    corner = decoder.frame(tmp_path / "a.png", box_crop(0.25, (0.0, 0.0)))
    assert corner.shape == (16, 16, 3)
    assert corner[..., 0].max() < 135, "the left half is the dark half of the first channel"
    right = decoder.frame(tmp_path / "a.png", box_crop(0.25, (0.999, 0.0)))
    assert right[..., 0].min() > 120
    flipped = decoder.frame(tmp_path / "a.png", box_crop(0.25, (0.999, 0.0), flip=True))
    assert np.array_equal(flipped, right[:, ::-1])


KINDS = {
    ".png": ["L", "P", "RGBA", "LA", "1", "I;16"],
    ".jpg": ["L", "CMYK", "1"],
    ".webp": ["L", "RGBA"],
    ".tif": ["L", "P", "RGBA", "CMYK", "I;16"],
}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in KINDS.items() for mode in modes])
def test_kinds_of_images(tmp_path, mode, suffix):
    path = tmp_path / f"a{suffix}"
    image = Image.fromarray(np.asarray(gradient().convert("L")).astype(np.uint16) * 257) if mode == "I;16" else (
        gradient().convert(mode))  # fmt: skip
    image.save(path)
    out = read_image(path)
    assert (out.mode, out.size) == ("RGB", (40, 30))
    grey = np.asarray(gradient().convert("L"), dtype=float)
    error = np.abs(np.asarray(out.convert("L"), dtype=float) - grey).mean()
    assert error < (130 if mode == "1" else 16), f"{mode} in {suffix}: {error}"


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    gradient(40, 30).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (30, 40)


def test_the_cache_changes_nothing_and_keeps_to_its_room(image_folder, monkeypatch):
    files = [f for frames in find_sequences(image_folder).frames for f in frames]
    reads = []
    monkeypatch.setattr("fastmum.data.decode.read_image", lambda file: reads.append(file) or read_image(file))
    one_image = 48 * 40 * 4
    plain, roomy, tight = (Decoder(32, room) for room in (0, 100 * one_image, 5 * one_image))
    for decoder in (roomy, tight):
        for _ in range(2):
            for file in files:
                assert np.array_equal(decoder.frame(file, whole_frame()), plain.frame(file, whole_frame()))
    by_plain = 4 * len(files)
    assert len(reads) - by_plain == len(files) + (2 * len(files) - 5)


def test_batches_come_in_order_and_equal_those_decoded_alone(image_folder):
    planner = StepPlanner(find_sequences(image_folder), 0, 12, (2, 5))
    plans = [planner.plan(step) for step in range(9)]
    loader = Loader(Decoder(32), workers=3)
    batches = list(loader.batches(plans))
    assert len(batches) == 9
    for plan, batch in zip(plans, batches, strict=True):
        assert batch.lengths == plan.lengths
        assert batch.frames.shape == (sum(plan.lengths), 32, 32, 3)
        assert torch.equal(batch.frames, loader.load(plan).frames)


def test_few_batches_are_decoded_ahead_and_waiting_is_counted(image_folder):
    planner = StepPlanner(find_sequences(image_folder), 0, 4, (2, 2))
    asked = []

    def plans():
        for step in range(50):
            asked.append(step)
            yield planner.plan(step)

    loader = Loader(Decoder(32), workers=2)
    slow, frame = threading.Event(), loader.decoder.frame
    loader.decoder.frame = lambda file, crop: (time.sleep(0.005), frame(file, crop))[1]
    batches = loader.batches(plans())
    next(batches)
    assert len(asked) <= 4
    assert loader.wait_seconds > 0.01
    batches.close()
    slow.set()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")], "no thread is left behind"


def plan_of(files):
    return StepPlan(tuple(files), (tuple(files),) * len(files), (len(files),), tuple(whole_frame() for _ in files))


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "missing"])
def test_a_broken_image_is_replaced_by_its_neighbour_and_said_once(image_folder, caplog, kind):
    files = sorted((image_folder / "scene0").iterdir())
    whole = files[2].read_bytes()
    match kind:
        case "empty":
            files[2].write_bytes(b"")
        case "text":
            files[2].write_text("not an image")
        case "truncated":
            files[2].write_bytes(whole[: len(whole) // 2])
        case "missing":
            files[2].unlink()
    loader = Loader(Decoder(32), workers=1)
    with caplog.at_level(logging.WARNING):
        first, second = loader.load(plan_of(files)), loader.load(plan_of(files))
    assert torch.equal(first.frames[2], first.frames[3])
    assert torch.equal(first.frames, second.frames)
    assert loader.bad_files == {files[2]}
    assert caplog.text.count("cannot be read and is replaced") == 1
    assert str(files[2]) in caplog.text


def test_a_scene_without_a_readable_image_stops_the_run_and_is_named(image_folder):
    files = sorted((image_folder / "scene0").iterdir())
    for file in files:
        file.write_bytes(b"")
    loader = Loader(Decoder(32), workers=1)
    with pytest.raises(DataError, match=r"no image in '.*scene0' can be read"):
        next(loader.batches([plan_of(files)]))
