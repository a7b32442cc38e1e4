"""Labels of rendered views agree with their depth, and leave the scenes as they are."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from fastmum.data.builders.base import image_folders
from fastmum.scenes import ScenesError
from fastmum.scenes.cache import Settings
from fastmum.scenes.files import write_scene
from fastmum.scenes.labels import CLASSES, ensure_labels
from fastmum.scenes.layout import KINDS, build_scene


def digests(root):
    files = sorted(file for file in root.glob("**/*") if file.is_file() and "label" not in file.parts)
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_labels_are_written_next_to_old_scenes(tmp_path):
    root, seen = tmp_path, set()
    for index in (0, 3):  # a room and a courtyard
        write_scene(root, index, Settings(0, 1, 64))
    before, folders = digests(root), sorted(root.iterdir())
    for folder in folders:
        cameras = json.loads((folder / "cameras.json").read_text())
        for frame, file in zip(cameras["frames"], ensure_labels(folder), strict=True):
            label = np.array(Image.open(file))
            depth = np.array(Image.open(folder / frame["depth"]))
            assert label.dtype == np.uint8
            assert np.array_equal(label == 0, depth == 0)  # the sky
            seen |= {CLASSES[i] for i in np.unique(label)}
            floor, ceiling = (np.nonzero(label == CLASSES.index(name))[0] for name in ("floor", "ceiling"))
            assert floor.max(initial=0) > 56  # rows
            assert ceiling.size == 0 or np.median(ceiling) < 32 < np.median(floor)
    assert seen >= {"sky", "floor", "wall", "ceiling"}
    assert digests(root) == before
    assert image_folders(root) == ["scene_0000", "scene_0003"]
    label = folders[0] / "label/000.png"
    content = label.read_bytes()
    label.unlink()
    ensure_labels(label.parents[1])
    assert label.read_bytes() == content
    cameras = label.parents[1] / "cameras.json"
    cameras.write_text(cameras.read_text().replace('"generator": 1', '"generator": 0'))
    label.unlink()
    with pytest.raises(ScenesError, match="generator 0"):
        ensure_labels(label.parents[1])


def test_every_part_has_a_label():
    kinds = set()
    for index in range(12):
        scene = build_scene(0, index)
        kinds.add(scene.kind)
        assert {part.label for part in scene.parts} <= {*CLASSES[1:]}
    assert kinds == {*KINDS}
