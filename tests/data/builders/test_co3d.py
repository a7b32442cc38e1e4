"""CO3D on a miniature of its annotations; cameras against an example computed by hand."""

import gzip
import json

import numpy as np
import pytest

from fastmum.data.builders.objects import SEEN
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError


def frame(sequence, number, category="apple", **viewpoint):
    return {
        "sequence_name": sequence,
        "frame_number": number,
        "image": {"path": f"{category}/{sequence}/images/frame{number:06d}.jpg", "size": [200, 100]},
        "viewpoint": {"R": np.eye(3).tolist(), "T": [0, 0, 0], "focal_length": [2, 2], "principal_point": [0, 0],
                      "intrinsics_format": "ndc_isotropic"} | viewpoint,
    }  # fmt: skip


@pytest.fixture
def annotate(raw):
    def write(category, frames):
        (raw / category).mkdir(exist_ok=True)
        with gzip.open(raw / category / "frame_annotations.jgz", "wt") as file:
            json.dump(frames, file)

    return write


def test_whole_sequences_of_at_least_24_frames(annotate, found, raw):
    long = [frame("189_20393_38136", i) for i in range(30, 0, -1)]
    short = [frame("110_13051_23361", i) for i in range(1, 24)]
    annotate("apple", long[:10] + short + long[10:])
    annotate("zebra", [frame("1_2_3", i, "zebra") for i in range(1, 25)])
    (raw / "no_annotations").mkdir()
    expected = {
        "apple/189_20393_38136": [f"apple/189_20393_38136/images/frame{i:06d}.jpg" for i in range(1, 31)],
        "zebra/1_2_3": [f"zebra/1_2_3/images/frame{i:06d}.jpg" for i in range(1, 25)],
    }
    assert found("co3d").sequences == expected
    assert found("co3d", rule="released").sequences == expected
    assert list(found("co3d", categories="seen").sequences) == ["apple/189_20393_38136"]
    assert len(SEEN) == 41
    assert found("co3d", min_frames=23).lengths["apple/110_13051_23361"] == 23
    assert found("co3d", poses=False).poses("zebra/1_2_3") == [None] * 24


def test_cameras_depth_and_masks_reach_the_manifest(annotate, add, found):
    frames = [frame("a", i, T=[i, 2 * i, 3]) for i in range(1, 25)]
    for i, each in enumerate(frames):
        path = f"apple/a/depths/frame{i}.jpg.geometric.png"
        each |= {"depth": {"path": path, "scale_adjustment": 1 + i}, "mask": {"path": f"apple/a/masks/frame{i}.png"}}
    frames[4]["viewpoint"] = frames[5]["depth"] = None
    add("apple/a/depths/frame3.jpg.geometric.png", "apple/a/masks/frame4.png")
    annotate("apple", frames)
    apple = found("co3d")
    poses, intrinsics = apple.poses("apple/a"), apple.intrinsics("apple/a")
    assert np.allclose(poses[1], [[-1, 0, 0, -2], [0, -1, 0, -4], [0, 0, 1, 3], [0, 0, 0, 1]])
    assert intrinsics[1].tolist() == [100, 100, 50, 100]
    assert poses[4] is intrinsics[4] is None
    assert apple.manifest.known == {"pose": 23, "intrinsics": 23, "depth": 1, "mask": 1}
    assert apple.depths("apple/a")[3] == "apple/a/depths/frame3.jpg.geometric.png"
    assert apple.depth_formats("apple/a") == {DepthFormat("co3d", 4.0, "z")}, "each frame has a separate unit"
    assert apple.masks("apple/a")[4] == "apple/a/masks/frame4.png"


def test_broken_annotations_are_named(raw, annotate, found):
    (raw / "apple").mkdir()
    for content in (b"", b"no gzip", gzip.compress(b"{"), gzip.compress(b'[{"a": 1}]'),
                    gzip.compress(b"[" + b" " * 10_000)[:-8]):  # fmt: skip
        (raw / "apple/frame_annotations.jgz").write_bytes(content)
        with pytest.raises(DataError, match=r"apple/frame_annotations\.jgz' cannot be read as CO3D") as caught:
            found("co3d")
        assert "\n" not in str(caught.value)
    annotate("apple", [frame("a", 1, intrinsics_format="pixels")])
    with pytest.raises(DataError, match="unknown intrinsics_format 'pixels'"):
        found("co3d")
