"""The five data sets whose numbered frames are chunked, on miniatures of their layouts, by both rules."""

import json

import numpy as np
import pytest

from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError


def chunked(scene, files, *lengths):
    """Sequences of the given lengths, one after another."""
    ends = np.cumsum(lengths)
    return {
        f"{scene}/{i:03d}": files[end - n : end] for i, (n, end) in enumerate(zip(lengths, ends.tolist(), strict=True))
    }


def test_streetview3d(add, found):
    files = [f"dataset_aligned/0001/{i}.jpg" for i in range(225)]
    add(*files, "dataset_aligned/0002/0.jpg", "dataset_aligned/0003/list.txt", "other/0/0.jpg")
    assert found("streetview3d").sequences == chunked("0001", files, 100, 100, 25)
    assert found("streetview3d", rule="released").sequences == chunked("0001", files, *[24] * 8, 33)


def test_realestate10k(add, found):
    clip = [f"train/a1b2/{i * 33367}.png" for i in range(130)]
    add(*clip, "train/c3/0.png", "train/c3/33.png", "test/d4/0.png", "test/d4/33.png")
    short = ["train/c3/0.png", "train/c3/33.png"]
    assert found("realestate10k").sequences == chunked("a1b2", clip, 100, 30) | chunked("c3", short, 2)
    assert found("realestate10k", rule="released").sequences == {"a1b2": clip, "c3": short}


def test_realestate10k_poses(add, found):
    add("train/a/1000.png", "train/a/2000.png", size=(640, 360))
    line = "2000 0.5 0.9 0.5 0.25 0 0  0 0 -1 3  0 1 0 -2  1 0 0 -1"
    add("train/a.txt", content=f"https://www.youtube.com/watch?v=x\n{line}\n")
    clip = found("realestate10k")
    assert clip.poses("a/000")[0] is None
    assert clip.poses("a/000")[1].tolist() == [[0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]]
    assert clip.intrinsics("a/000")[1].tolist() == [320, 324, 320, 90]
    add("train/a.txt", content="address\n1 2 3\n")
    with pytest.raises(DataError, match=r"train/a\.txt' cannot be read as a RealEstate10K clip"):
        found("realestate10k")


def scannetpp(i, scene="0a5c013435"):
    return f"{scene}/dslr/resized_undistorted_images/DSC{i:05d}.JPG"


def test_scannetpp_takes_the_training_list(add, found):
    listed = [f"DSC{i:05d}.JPG" for i in range(1, 232) if i % 2]  # 116
    lists = {"train": listed[::-1] + ["DSC09999.JPG"], "test": ["DSC00002.JPG"], "has_masks": False}
    add(*(scannetpp(i) for i in range(1, 232)), "b/iphone/rgb.mp4")
    add("0a5c013435/dslr/train_test_lists.json", content=json.dumps(lists))
    files = [scannetpp(i) for i in range(1, 232) if i % 2]
    assert found("scannetpp").sequences == chunked("0a5c013435", files, 100, 16)
    assert found("scannetpp", rule="released").sequences == chunked("0a5c013435", files, 116)


def test_scannetpp_poses_come_from_nerfstudio(add, found):
    add(scannetpp(1), scannetpp(2), size=(60, 40))
    add("0a5c013435/dslr/train_test_lists.json", content=json.dumps({"train": ["DSC00001.JPG", "DSC00002.JPG"]}))
    opengl = [[0, 0, -1, 1], [0, -1, 0, 2], [-1, 0, 0, 3], [0, 0, 0, 1]]
    frames = [{"file_path": f"DSC0000{i}.JPG", "transform_matrix": opengl} for i in (1, 2)]
    cameras = {"w": 60, "h": 40, "fl_x": 50, "fl_y": 51, "cx": 30, "cy": 20, "frames": frames[:1], "test_frames": []}
    add("0a5c013435/dslr/nerfstudio/transforms_undistorted.json", content=json.dumps(cameras))
    scene = found("scannetpp")
    # The camera of test_whole_scenes.py.
    expected = [[0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]]
    assert np.allclose(scene.poses("0a5c013435/000")[0], expected)
    assert scene.poses("0a5c013435/000")[1] is None
    assert scene.intrinsics("0a5c013435/000")[0].tolist() == [50, 51, 30, 20]


def test_scannetpp_masks(add, found):
    masks = [f"a/dslr/resized_undistorted_masks/DSC0000{i}.png" for i in (1, 2)]
    add(*(scannetpp(i, "a") for i in (1, 2)), masks[1])
    add("a/dslr/train_test_lists.json", content=json.dumps({"train": ["DSC00001.JPG", "DSC00002.JPG"]}))
    assert found("scannetpp").masks("a/000") == [None, masks[1]]
    assert found("scannetpp", depth=False).masks("a/000") == [None, None]


@pytest.mark.parametrize("content", [None, "{", "{}", "[]", '{"train": 3}'])
def test_scannetpp_without_a_training_list_is_one_line(add, found, content):
    add(scannetpp(1))
    if content is not None:
        add("0a5c013435/dslr/train_test_lists.json", content=content)
    with pytest.raises(DataError, match=r"train_test_lists\.json' cannot be read as a scene's training list") as caught:
        found("scannetpp")
    assert "\n" not in str(caught.value)


def test_blendedmvs(add, found):
    files = [f"5a3ca9cb/blended_images/{i:08d}.jpg" for i in range(101)]
    add(*files, *(file.replace(".jpg", "_masked.jpg") for file in files), "5a3ca9cb/rendered_depth_maps/0.pfm")
    # The hundred-and-first frame would be a sequence of its own, too short to draw two views from.
    assert found("blendedmvs").sequences == chunked("5a3ca9cb", files[:100], 100)
    assert found("blendedmvs", min_frames=1).sequences == chunked("5a3ca9cb", files, 100, 1)
    assert found("blendedmvs", rule="released").sequences == {"5a3ca9cb": files}


def test_blendedmvs_poses(add, found):
    add(*(f"s/blended_images/{i:08d}.jpg" for i in range(2)))
    camera = (
        "extrinsic\n0 0 -1 3\n0 1 0 -2\n1 0 0 -1\n0 0 0 1\n\nintrinsic\n500 0 320\n0 510 240\n0 0 1\n\n1 0.1 128 9\n"
    )
    add("s/cams/00000001_cam.txt", content=camera)
    scene = found("blendedmvs")
    assert scene.poses("s/000")[0] is None
    assert scene.poses("s/000")[1].tolist() == [[0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]]
    assert scene.intrinsics("s/000")[1].tolist() == [500, 510, 320, 240]
    add("s/cams/00000001_cam.txt", content="extrinsic 1 2 3")
    with pytest.raises(DataError, match=r"00000001_cam\.txt' cannot be read as a camera"):
        found("blendedmvs")


def test_blendedmvs_depth(add, found, caplog):
    add(*(f"s/blended_images/{i:08d}.jpg" for i in range(102)), "s/rendered_depth_maps/00000101.pfm")
    scene = found("blendedmvs", chunk=100)
    assert scene.manifest.known["depth"] == 1
    assert scene.depths("s/001") == [None, "s/rendered_depth_maps/00000101.pfm"]
    assert scene.depth_format("s/001", 1) == DepthFormat("pfm", 1.0, "z")
    assert "101 of 102 frames have no depth" in caplog.text


def arkit(i, scan="42444499", folder="lowres_wide", suffix="png"):
    return f"3dod/Training/{scan}/{scan}_frames/{folder}/{scan}_{1000 + i / 10:.3f}.{suffix}"


def test_arkitscenes(add, found):
    files = [arkit(i) for i in range(160)]
    add(*files, "3dod/Training/42444499/42444499_3dod_annotation.json", arkit(0, folder="lowres_depth"))
    add("3dod/Validation/41048190/41048190_frames/lowres_wide/41048190_1.png")
    assert found("arkitscenes").sequences == chunked("42444499", files, 100, 60)
    assert found("arkitscenes", rule="released").sequences == chunked("42444499", files, 75, 85)


def test_arkitscenes_poses(add, found):
    add(*(arkit(i) for i in range(3)))
    # A quarter turn about y and a translation; the second frame has no pose within 5 ms.
    traj = f"1000.0004 0 {np.pi / 2} 0 3 -2 -1\n1000.2001 0 0 0 1 2 3\n"
    add("3dod/Training/42444499/42444499_frames/lowres_wide.traj", content=traj)
    add(arkit(2, folder="lowres_wide_intrinsics", suffix="pincam"), content="256 192 211.9 212.1 127.9 95.9")
    scan = found("arkitscenes")
    poses = scan.poses("42444499/000")
    # Turning +z by +90 degrees about y gives +x, and +x gives -z.
    assert np.allclose(poses[0], [[0, 0, 1, 3], [0, 1, 0, -2], [-1, 0, 0, -1], [0, 0, 0, 1]], atol=1e-6)
    assert poses[1] is None
    assert np.allclose(poses[2][:3, 3], [1, 2, 3])
    intrinsics = scan.intrinsics("42444499/000")
    assert intrinsics[0] is None
    assert np.allclose(intrinsics[2], [211.9, 212.1, 127.9, 95.9])
    for content in ("1 2 3\n", "text\n", ""):
        add("3dod/Training/42444499/42444499_frames/lowres_wide.traj", content=content)
        with pytest.raises(DataError, match=r"lowres_wide\.traj' cannot be read as a trajectory"):
            found("arkitscenes")


def test_arkitscenes_depth(add, found):
    add(arkit(0), arkit(1), arkit(1, folder="lowres_depth"))
    scan = found("arkitscenes")
    assert scan.depths("42444499/000") == [None, arkit(1, folder="lowres_depth")]
    assert scan.depth_format("42444499/000", 1) == DepthFormat("png16", 1e-3, "z")


def test_the_chunk_can_be_given(add, found):
    add(*(f"dataset_aligned/0001/{i}.jpg" for i in range(90)))
    assert list(found("streetview3d", chunk=40).lengths.values()) == [40, 40, 10]
    assert list(found("streetview3d", chunk=40, rule="released").lengths.values()) == [40, 50]
    assert found("streetview3d", chunk=0).lengths == {"0001": 90}
