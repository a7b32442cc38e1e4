"""DL3DV-10K, Hypersim, WildRGB-D and ImageNet on miniatures of their layouts."""

import json

import numpy as np
import pytest

from fastmum.data.errors import DataError

# A camera at (1, 2, 3) turned by 90 degrees about the world's y axis: it looks along +x. With OpenCV axes its x is the
# world's -z, its y the world's y, its z the world's x; world-to-camera therefore holds these rows, and -R c.
CENTRE = [1.0, 2.0, 3.0]
WORLD_TO_CAMERA = np.array([[0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]], np.float32)
CAMERA_TO_WORLD = np.array([[0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3], [0, 0, 0, 1]], float)
# The same camera with OpenGL axes: y and z point the other way.
OPENGL_TO_WORLD = CAMERA_TO_WORLD * [1, -1, -1, 1]


def test_dl3dv(add, found):
    add(*(f"1K/abc/images_8/frame_{i:05d}.png" for i in (2, 10, 1)), size=(4, 3))
    add("1K/abc/images_8/other.png", "2K/def/images_8/frame_00001.png", "2K/def/images_4/frame_00002.png")
    add("1K/empty/images_8/notes.txt")
    expected = {"1K/abc": [f"1K/abc/images_8/frame_{i:05d}.png" for i in (1, 2, 10)]}
    assert found("dl3dv").sequences == expected
    assert found("dl3dv", rule="released").sequences == expected
    assert found("dl3dv", min_frames=1, images="images_4").sequences == {"2K/def": ["2K/def/images_4/frame_00002.png"]}


def test_dl3dv_poses_are_turned_from_opengl_and_intrinsics_fit_the_small_images(add, found):
    add(*(f"1K/abc/images_8/frame_{i:05d}.png" for i in (1, 2)), size=(480, 270))
    frame = {"file_path": "images/frame_00002.png", "transform_matrix": OPENGL_TO_WORLD.tolist()}
    common = {"w": 3840, "h": 2160, "fl_x": 1600, "fl_y": 1608, "cx": 1920, "cy": 1080}
    add("1K/abc/transforms.json", content=json.dumps(common | {"frames": [frame]}))
    abc = found("dl3dv")
    assert abc.poses("1K/abc")[0] is None
    assert np.allclose(abc.poses("1K/abc")[1], WORLD_TO_CAMERA)
    assert abc.intrinsics("1K/abc")[0] is None
    assert abc.intrinsics("1K/abc")[1].tolist() == [200, 201, 240, 135]
    assert found("dl3dv", poses=False).poses("1K/abc") == [None, None]


def test_dl3dv_broken_cameras_are_named(add, found):
    add(*(f"1K/abc/images_8/frame_{i}.png" for i in (1, 2)), size=(4, 3))
    for content in (
        "{",
        '{"frames": 3}',
        '{"frames": [{"file_path": "a/frame_1.png", "transform_matrix": [1]}]}',
        "[]",
    ):
        add("1K/abc/transforms.json", content=content)
        with pytest.raises(DataError, match=r"abc/transforms\.json' cannot be read as a nerfstudio") as caught:
            found("dl3dv")
        assert "\n" not in str(caught.value)


def hypersim(camera, frame, kind="tonemap", scene="ai_001_001"):
    return f"{scene}/images/scene_cam_{camera}_final_preview/frame.{frame:04d}.{kind}.jpg"


def test_hypersim(add, found):
    add(*(hypersim("00", i) for i in (0, 10, 9)), *(hypersim("01", i) for i in (0, 1)))
    add(hypersim("00", 0, "color"), hypersim("00", 0, "tonemap", "ai_002_001"), "ai_003_001/_detail/metadata.csv")
    add(hypersim("00", 3).replace("final", "geometry"), hypersim("00", 3).replace(".jpg", ".png"))
    assert found("hypersim").sequences == {
        "ai_001_001": [hypersim("00", i) for i in (0, 9, 10)] + [hypersim("01", i) for i in (0, 1)]
    }
    assert found("hypersim", rule="released").sequences == {
        "ai_001_001": [hypersim("00", 0, "color")] + [hypersim("00", i) for i in (0, 9, 10)]
    }


def test_hypersim_without_tone_mapped_frames(add, found):
    add(*(hypersim("00", i, "color") for i in range(3)))
    assert found("hypersim").lengths == {"ai_001_001": 3}


def test_wildrgbd(add, found):
    for scene, frames in (("scene_001", 24), ("scene_010", 23), ("scene_002", 30)):
        add(*(f"apple/scenes/{scene}/rgb/{i:05d}.png" for i in range(frames)))
    add("apple/scenes/scene_001/depth/00000.png", "ball/notes.txt")
    expected = {
        f"apple/{scene}": [f"apple/scenes/{scene}/rgb/{i:05d}.png" for i in range(frames)]
        for scene, frames in (("scene_001", 24), ("scene_002", 30))
    }
    assert found("wildrgbd").sequences == expected
    assert found("wildrgbd", rule="released").sequences == expected
    assert found("wildrgbd", min_frames=23).lengths["apple/scene_010"] == 23


def test_wildrgbd_poses(add, found):
    folder = "apple/scenes/scene_001"
    add(*(f"{folder}/rgb/{i:05d}.png" for i in range(24)))
    numbers = " ".join(map(str, CAMERA_TO_WORLD.ravel()))
    add(f"{folder}/cam_poses.txt", content=f"3 {numbers}\n0 {' '.join(map(str, np.eye(4).ravel()))}\n")
    # K lies column by column in the file.
    add(f"{folder}/metadata", content=json.dumps({"w": 480, "h": 640, "K": [500, 0, 0, 0, 510, 0, 240, 320, 1]}))
    scene = found("wildrgbd")
    poses = scene.poses("apple/scene_001")
    assert np.allclose(poses[3], WORLD_TO_CAMERA)
    assert np.allclose(poses[0], np.eye(4))
    assert poses[1] is None
    assert scene.intrinsics("apple/scene_001")[23].tolist() == [500, 510, 240, 320]
    add(f"{folder}/cam_poses.txt", content="1 2 3\n")
    with pytest.raises(DataError, match=r"cam_poses\.txt' cannot be read as poses"):
        found("wildrgbd")


@pytest.mark.parametrize("prefix", ["train/", ""])
def test_imagenet(add, found, prefix):
    images = [f"{prefix}n01440764/n01440764_{i}.JPEG" for i in (2, 18, 100)] + [f"{prefix}n01443537/a.JPEG"]
    add(*images, f"{prefix}n01440764/readme.txt")
    assert found("imagenet").sequences == {image: [image] for image in images}
    assert found("imagenet", rule="released").sequences == found("imagenet").sequences
