"""DL3DV-10K, Hypersim, WildRGB-D and ImageNet on miniatures of their layouts."""

import json

import numpy as np
import pytest

from fastmum.data.depth import DepthFormat
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


@pytest.mark.parametrize("tilt", [0, 10])
def test_hypersim_cameras_and_depth(add, found, raw, tilt):
    """A camera of 90 degrees (u = x / -z), whose image plane may be turned about x; positions are in half metres."""
    h5py = pytest.importorskip("h5py")
    add(*(hypersim("00", i) for i in (0, 7)), size=(40, 20))
    add("ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0007.depth_meters.hdf5")
    cos, sin = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    about_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    cam_from_uv = about_x @ np.diag([1, 0.5, -1])
    names = [f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3)]
    rows = [["scene_name", "settings_units_info_meters_scale", *names], ["ai_001_001", 0.5, *cam_from_uv.ravel()]]
    add("metadata_camera_parameters.csv", content="\n".join(",".join(map(str, row)) for row in rows))
    folder = raw / "ai_001_001/_detail/cam_00"
    folder.mkdir(parents=True)
    for what, values in (
        ("frame_indices", [7, 8]),
        ("positions", [[2.0, 4.0, 6.0]] * 2),
        ("orientations", [OPENGL_TO_WORLD[:3, :3]] * 2),
    ):
        with h5py.File(folder / f"camera_keyframe_{what}.hdf5", "w") as archive:
            archive["dataset"] = values
    scene = found("hypersim")
    assert scene.poses("ai_001_001")[0] is None
    pose, (fx, fy, cx, cy) = scene.poses("ai_001_001")[1], scene.intrinsics("ai_001_001")[1]
    if not tilt:
        assert np.allclose(pose, WORLD_TO_CAMERA)
    assert np.allclose([fx, fy, cx, cy], [20, 20, 20, 10], rtol=1e-5)
    # The ray of the pixel (30, 5), u = v = 0.5, comes back to it.
    ray = OPENGL_TO_WORLD[:3, :3] @ cam_from_uv @ [0.5, 0.5, 1]
    x, y, z, _ = pose @ np.array([*(np.array(CENTRE) + 3 * ray), 1])
    assert z > 0
    assert np.allclose((fx * x / z + cx, fy * y / z + cy), (30, 5), atol=1e-3)
    depth = "ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0007.depth_meters.hdf5"
    assert scene.depths("ai_001_001") == [None, depth]
    assert scene.depth_format("ai_001_001", 1) == DepthFormat("hdf5", 1.0, "ray")


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


def test_wildrgbd_depth_and_masks(add, found):
    folder = "apple/scenes/scene_001"
    add(*(f"{folder}/rgb/{i:05d}.png" for i in range(24)), f"{folder}/depth/00001.png", f"{folder}/masks/00002.png")
    scene = found("wildrgbd")
    assert scene.depths("apple/scene_001")[:3] == [None, f"{folder}/depth/00001.png", None]
    assert scene.masks("apple/scene_001")[:3] == [None, None, f"{folder}/masks/00002.png"]
    assert scene.depth_format("apple/scene_001", 1) == DepthFormat("png16", 1e-3, "z")


def test_rendered_scenes(add, found):
    frames = [{"file": f"{i}.png", "depth": f"depth/{i}.png", "K": np.diag([300, 310, 1]).tolist(),
               "T_cam_world": WORLD_TO_CAMERA.tolist()} for i in range(2)]  # fmt: skip
    add("scene_0003/0.png", "scene_0003/1.png", "scene_0003/depth/1.png", "other/0.png")
    add("scene_0003/cameras.json", content=json.dumps({"depth_unit": 0.0005, "frames": frames}))
    scene = found("scenes")
    assert scene.sequences == {"scene_0003": ["scene_0003/0.png", "scene_0003/1.png"]}
    assert scene.poses("scene_0003")[1].tolist() == WORLD_TO_CAMERA.tolist()
    assert scene.intrinsics("scene_0003")[1].tolist() == [300, 310, 0, 0]
    assert scene.depths("scene_0003") == [None, "scene_0003/depth/1.png"]
    assert scene.depth_format("scene_0003", 1) == DepthFormat("png16", 0.0005, "z")
    add("scene_0003/cameras.json", content='{"frames": [{}]}')
    with pytest.raises(DataError, match=r"scene_0003/cameras\.json' cannot be read"):
        found("scenes")


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
