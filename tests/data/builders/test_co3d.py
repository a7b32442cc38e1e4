"""CO3D on a miniature of its annotations; cameras against an example computed by hand."""

import gzip
import json

import numpy as np
import pytest

from fastmum.data.builders.co3d import SEEN, camera
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
    assert found("co3d", min_frames=23).lengths["apple/110_13051_23361"] == 23
    assert found("co3d", poses=False).poses("zebra/1_2_3") == [None] * 24


def test_there_are_41_seen_categories():
    assert len(SEEN) == 41


def test_a_camera_by_hand():
    """PyTorch3D's camera at (1, 2, 3), turned by 90 degrees about y; a picture 100 wide and 200 high.

    R takes rows: x_camera = x_world R + T. This R sends the world's x axis to the camera's z: it looks along +x. With
    T = -c R the centre goes to 0. A point 4 in front, 1 to the camera's left and 2 above then lies at
    c + 4 x + left + 2 y; the camera's left (+x of PyTorch3D) is the row vector that R sends to (1, 0, 0): -z.
    """
    R = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], float)
    c = np.array([1.0, 2.0, 3.0])
    point = c + 4 * np.array([1, 0, 0]) + 1 * np.array([0, 0, -1]) + 2 * np.array([0, 1, 0])
    T = -c @ R
    assert np.allclose(point @ R + T, [1, 2, 4]), "the example itself: left 1, up 2, in front 4"

    pose, _ = camera(frame("a", 1, R=R.tolist(), T=T.tolist()))
    assert np.allclose(pose @ [*point, 1], [-1, -2, 4, 1]), "OpenCV: x to the right, y down"
    assert np.allclose(np.linalg.det(pose[:3, :3]), 1)

    # Isotropic: the unit is half the shorter side, 50 pixels. The point is 2 * 1/4 = 0.5 units left of the principal
    # point, which is 0.1 units left and 0.2 below the centre (50, 100): at x = 50 - 0.6 * 50, y = 100 - 0.8 * 50.
    view = {"R": R.tolist(), "T": T.tolist(), "focal_length": [2, 2], "principal_point": [0.1, -0.2]}
    for kind, expected in (("ndc_isotropic", (20, 60)), ("ndc_norm_image_bounds", (20, 20))):
        pose, (fx, fy, cx, cy) = camera(frame("a", 1, **view, intrinsics_format=kind))
        x, y, z, _ = pose @ [*point, 1]
        assert np.allclose((fx * x / z + cx, fy * y / z + cy), expected), kind
    # By image bounds the vertical unit is half the height, 100 pixels: y = 100 - 0.8 * 100.


def test_poses_reach_the_manifest(annotate, found):
    frames = [frame("a", i, T=[i, 2 * i, 3]) for i in range(1, 25)]
    frames[4]["viewpoint"] = None
    annotate("apple", frames)
    apple = found("co3d")
    poses, intrinsics = apple.poses("apple/a"), apple.intrinsics("apple/a")
    assert np.allclose(poses[1], [[-1, 0, 0, -2], [0, -1, 0, -4], [0, 0, 1, 3], [0, 0, 0, 1]])
    assert intrinsics[1].tolist() == [100, 100, 50, 100]
    assert poses[4] is None
    assert intrinsics[4] is None


def test_depth_and_masks_that_exist(annotate, add, found):
    frames = [frame("a", i) for i in range(1, 25)]
    for i, each in enumerate(frames):
        path = f"apple/a/depths/frame{i}.jpg.geometric.png"
        each |= {"depth": {"path": path, "scale_adjustment": 1 + i}, "mask": {"path": f"apple/a/masks/frame{i}.png"}}
    frames[5]["depth"] = None
    add("apple/a/depths/frame3.jpg.geometric.png", "apple/a/masks/frame4.png")
    annotate("apple", frames)
    apple = found("co3d")
    assert apple.manifest.known["depth"] == apple.manifest.known["mask"] == 1
    assert apple.depths("apple/a")[3] == "apple/a/depths/frame3.jpg.geometric.png"
    assert apple.depth_format("apple/a", 3) == DepthFormat("co3d", 4.0, "z")
    assert apple.masks("apple/a")[4] == "apple/a/masks/frame4.png"


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b"{"), gzip.compress(b'[{"a": 1}]'),
                                     gzip.compress(b"[" + b" " * 10_000)[:-8]])  # fmt: skip
def test_broken_annotations_are_named(raw, found, content):
    (raw / "apple").mkdir()
    (raw / "apple/frame_annotations.jgz").write_bytes(content)
    with pytest.raises(DataError, match=r"apple/frame_annotations\.jgz' cannot be read as CO3D") as caught:
        found("co3d")
    assert "\n" not in str(caught.value)


def test_unknown_intrinsics_are_refused(annotate, found):
    annotate("apple", [frame("a", 1, intrinsics_format="pixels")])
    with pytest.raises(DataError, match="unknown intrinsics_format 'pixels'"):
        found("co3d")
