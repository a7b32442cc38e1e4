"""Data sets with a folder per scene or object, on miniatures of their layouts: sequences, cameras, depth, masks."""

import gzip
import json
import logging

import numpy as np
import pytest

from fastmum.data.builders.objects import SEEN
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError

# A camera at (1, 2, 3), turned by 90 degrees about the world's y axis: it looks along +x. With OpenCV axes its x is the
# world's -z, its y the world's y, its z the world's x; camera_from_world has these rows, and -R c.
CAMERA_FROM_WORLD = [[0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]]
WORLD_FROM_CAMERA = np.array([[0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3], [0, 0, 0, 1]], float)
WORLD_FROM_OPENGL = WORLD_FROM_CAMERA * [1, -1, -1, 1]  # y and z point the other way


def chunked(scene, files, *lengths):
    """Sequences of the given lengths, one after another."""
    ends = np.cumsum(lengths).tolist()
    return {f"{scene}/{i:03d}": files[end - n : end] for i, (n, end) in enumerate(zip(lengths, ends, strict=True))}


def is_camera(pose):
    return pose is not None and np.allclose(pose, CAMERA_FROM_WORLD)


def fails_in_one_line(found, name, match):
    with pytest.raises(DataError, match=rf"^[^\n]*{match}[^\n]*$"):
        found(name)


def test_streetview3d_and_the_size_of_chunks(add, found):
    files = [f"dataset_aligned/0001/{i}.jpg" for i in range(225)]
    add(*files, "dataset_aligned/0002/0.jpg", "dataset_aligned/0003/list.txt", "other/0/0.jpg")
    assert found("streetview3d").sequences == chunked("0001", files, 100, 100, 25)
    assert found("streetview3d", rule="released").sequences == chunked("0001", files, *[24] * 8, 33)
    assert list(found("streetview3d", chunk=90).lengths.values()) == [90, 90, 45]
    assert list(found("streetview3d", chunk=90, rule="released").lengths.values()) == [90, 135]
    assert found("streetview3d", chunk=0).lengths == {"0001": 225}
    assert list(found("streetview3d", chunk=75, rule="released").lengths.values()) == [75, 150]


def test_realestate10k(add, found):
    clip = [f"train/a1/{i * 1000}.png" for i in range(130)]
    short = ["train/c3/0.png", "train/c3/33.png"]
    add(*clip, *short, "test/d4/0.png", "test/d4/33.png")
    add(clip[0], size=(640, 360))
    add("train/a1.txt", content="https://youtube\n2000 0.5 0.9 0.5 0.25 0 0  0 0 -1 3  0 1 0 -2  1 0 0 -1\n")
    paper = found("realestate10k")
    assert paper.sequences == chunked("a1", clip, 100, 30) | chunked("c3", short, 2)
    assert found("realestate10k", rule="released").sequences == {"a1": clip, "c3": short}
    assert [is_camera(pose) for pose in paper.poses("a1/000")[:4]] == [False, False, True, False]
    assert paper.intrinsics("a1/000")[2].tolist() == [320, 324, 320, 90]
    add("train/c3.txt", content="https://youtube\n")
    assert {*found("realestate10k", poses=False).manifest.scene_names(np.arange(3))} == {"https://youtube"}
    add("train/a1.txt", content="address\n1 2 3\n")
    fails_in_one_line(found, "realestate10k", r"train/a1\.txt' cannot be read as a RealEstate10K clip")


def scannetpp(i, folder="images", suffix="JPG"):
    return f"0a5c/dslr/resized_undistorted_{folder}/DSC{i:05d}.{suffix}"


def test_scannetpp_takes_the_training_list(add, found, caplog):
    listed = [f"DSC{i:05d}.JPG" for i in range(1, 232) if i % 2]  # 116
    lists = {"train": listed[::-1] + ["DSC09999.JPG"], "test": ["DSC00002.JPG"], "has_masks": False}
    add(*(scannetpp(i) for i in range(1, 232)), "b/iphone/rgb.mp4", scannetpp(3, "masks", "png"))
    add(scannetpp(1), size=(60, 40))
    add("0a5c/dslr/train_test_lists.json", content=json.dumps(lists))
    frames = [{"file_path": f"DSC0000{i}.JPG", "transform_matrix": WORLD_FROM_OPENGL.tolist()} for i in (1, 2)]
    cameras = {"w": 60, "h": 40, "fl_x": 50, "fl_y": 51, "cx": 30, "cy": 20, "frames": frames, "test_frames": []}
    add("0a5c/dslr/nerfstudio/transforms_undistorted.json", content=json.dumps(cameras))
    add("without_a_list/dslr/resized_undistorted_images/DSC00001.JPG")
    files = [scannetpp(i) for i in range(1, 232) if i % 2]
    paper = found("scannetpp")
    assert paper.sequences == chunked("0a5c", files, 100, 16)
    assert found("scannetpp", rule="released").sequences == chunked("0a5c", files, 116)
    assert "without_a_list/dslr/train_test_lists.json" in caplog.text
    assert [is_camera(pose) for pose in paper.poses("0a5c/000")[:2]] == [True, False]
    assert paper.intrinsics("0a5c/000")[0].tolist() == [50, 51, 30, 20]
    assert paper.masks("0a5c/000")[:3] == [None, scannetpp(3, "masks", "png"), None]
    without = found("scannetpp", poses=False, depth=False)
    assert without.manifest.known == dict.fromkeys(without.manifest.known, 0)
    for content in ("{", "{}", "[]", '{"train": 3}'):
        add("0a5c/dslr/train_test_lists.json", content=content)
        fails_in_one_line(found, "scannetpp", r"train_test_lists\.json' cannot be read as a scene's training list")


def test_blendedmvs(add, found, caplog):
    files = [f"s/blended_images/{i:08d}.jpg" for i in range(101)]
    add(*files, *(file.replace(".jpg", "_masked.jpg") for file in files), "s/rendered_depth_maps/00000001.pfm")
    pose, K = "0 0 -1 3\n0 1 0 -2\n1 0 0 -1\n0 0 0 1\n", "500 0 320\n0 510 240\n0 0 1\n"
    add("s/cams/00000001_cam.txt", content=f"extrinsic\n{pose}\nintrinsic\n{K}\n1 0.1 128 9\n")
    paper = found("blendedmvs")
    # The hundred-and-first frame would be a separate sequence, too short to draw two views from.
    assert paper.sequences == chunked("s", files[:100], 100)
    assert found("blendedmvs", min_frames=1).sequences == chunked("s", files, 100, 1)
    assert found("blendedmvs", rule="released").sequences == {"s": files}
    assert [is_camera(pose) for pose in paper.poses("s/000")[:3]] == [False, True, False]
    assert paper.intrinsics("s/000")[1].tolist() == [500, 510, 320, 240]
    assert paper.depths("s/000")[:3] == [None, "s/rendered_depth_maps/00000001.pfm", None]
    assert paper.depth_formats("s/000") == {DepthFormat("pfm", 1.0, "z")}
    assert "99 of 100 frames have no depth" in caplog.text
    add("s/cams/00000001_cam.txt", content="extrinsic 1 2 3")
    fails_in_one_line(found, "blendedmvs", r"00000001_cam\.txt' cannot be read as a camera")


def arkit(i, folder="lowres_wide", suffix="png"):
    return f"3dod/Training/42/42_frames/{folder}/42_{1000 + i / 10:.3f}.{suffix}"


def test_arkitscenes(add, found):
    files = [arkit(i) for i in range(160)]
    add(*files, "3dod/Training/42/42_3dod_annotation.json", arkit(1, "lowres_depth"))
    add("3dod/Validation/41048190/41048190_frames/lowres_wide/41048190_1.png")
    # A quarter turn about y and a translation; the second frame has no pose within 5 ms.
    trajectory = f"1000.0004 0 {np.pi / 2} 0 3 -2 -1\n1000.2001 0 0 0 1 2 3\n"
    add("3dod/Training/42/42_frames/lowres_wide.traj", content=trajectory)
    add(arkit(2, "lowres_wide_intrinsics", "pincam"), content="256 192 211.9 212.1 127.9 95.9")
    scan = found("arkitscenes")
    assert scan.sequences == chunked("42", files, 100, 60)
    assert found("arkitscenes", rule="released").sequences == chunked("42", files, 75, 85)
    poses, intrinsics = scan.poses("42/000"), scan.intrinsics("42/000")
    # Turning +z by +90 degrees about y gives +x, and +x gives -z.
    assert np.allclose(poses[0], [[0, 0, 1, 3], [0, 1, 0, -2], [-1, 0, 0, -1], [0, 0, 0, 1]], atol=1e-6)
    assert poses[1] is None
    assert np.allclose(poses[2][:3, 3], [1, 2, 3])
    assert intrinsics[0] is None
    assert np.allclose(intrinsics[2], [211.9, 212.1, 127.9, 95.9])
    assert scan.manifest.scene_names(np.arange(2)) == ["42", "42"]
    add(*(arkit(i).replace("42", "43") for i in range(2)))
    add("3dod_train_val_splits.csv", content="video_id,visit_id,fold\n42,7,Training\n43,7,Training\n")
    assert found("arkitscenes").manifest.scene_names(np.arange(3)) == ["visit 7"] * 3
    assert scan.depths("42/000")[:3] == [None, arkit(1, "lowres_depth"), None]
    assert scan.depth_formats("42/000") == {DepthFormat("png16", 1e-3, "z")}
    for content in ("1 2 3\n", "text\n", ""):
        add("3dod/Training/42/42_frames/lowres_wide.traj", content=content)
        fails_in_one_line(found, "arkitscenes", r"lowres_wide\.traj' cannot be read as a trajectory")


def test_dl3dv(add, found):
    add(*(f"1K/abc/images_8/frame_{i:05d}.png" for i in (2, 10, 1)), size=(480, 270))
    add("1K/abc/images_8/other.png", "2K/def/images_8/frame_00001.png", "2K/def/images_4/frame_00002.png")
    add("1K/empty/images_8/notes.txt")
    frame = {"file_path": "images/frame_00002.png", "transform_matrix": WORLD_FROM_OPENGL.tolist()}
    common = {"w": 3840, "h": 2160, "fl_x": 1600, "fl_y": 1608, "cx": 1920, "cy": 1080}
    add("1K/abc/transforms.json", content=json.dumps(common | {"frames": [frame]}))
    abc = found("dl3dv")
    assert abc.sequences == {"1K/abc": [f"1K/abc/images_8/frame_{i:05d}.png" for i in (1, 2, 10)]}
    assert found("dl3dv", rule="released").sequences == abc.sequences
    assert found("dl3dv", min_frames=1, images="images_4").sequences == {"2K/def": ["2K/def/images_4/frame_00002.png"]}
    assert [is_camera(pose) for pose in abc.poses("1K/abc")] == [False, True, False]
    assert abc.intrinsics("1K/abc")[0] is None
    assert abc.intrinsics("1K/abc")[1].tolist() == [200, 201, 240, 135], "of the small images"
    for content in ("{", '{"frames": 3}', '{"frames": [{"file_path": "a/frame_00001.png", "transform_matrix": [1]}]}'):
        add("1K/abc/transforms.json", content=content)
        fails_in_one_line(found, "dl3dv", r"abc/transforms\.json' cannot be read as a nerfstudio")


def hypersim(camera, frame, kind="tonemap", scene="ai_001_001"):
    return f"{scene}/images/scene_cam_{camera}_final_preview/frame.{frame:04d}.{kind}.jpg"


def test_hypersim(add, found):
    untoned = [hypersim("00", i, "color", "ai_002_001") for i in range(3)]
    add(*(hypersim("00", i) for i in (0, 10, 9)), *(hypersim("01", i) for i in (0, 1)))
    add(hypersim("00", 0, "color"), *untoned, "ai_003_001/_detail/x")
    add(hypersim("00", 3).replace("final", "geometry"), hypersim("00", 3).replace(".jpg", ".png"))
    assert found("hypersim").sequences == {
        "ai_001_001": [hypersim("00", i) for i in (0, 9, 10)] + [hypersim("01", i) for i in (0, 1)],
        "ai_002_001": untoned,
    }
    assert found("hypersim", rule="released").sequences == {
        "ai_001_001": [hypersim("00", 0, "color")] + [hypersim("00", i) for i in (0, 9, 10)],
        "ai_002_001": untoned,
    }


@pytest.mark.parametrize("tilt", [0, 10])
def test_hypersim_cameras_and_depth(add, found, raw, tilt):
    """A camera of 90 degrees (u = x / -z), whose image plane may be turned about x; positions are in half metres."""
    h5py = pytest.importorskip("h5py")
    depth = "ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0007.depth_meters.hdf5"
    add(hypersim("00", 7), size=(40, 20))
    add(depth, hypersim("00", 0))  # an unreadable image
    cos, sin = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    cam_from_uv = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ np.diag([1, 0.5, -1])
    names = [f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3)]
    rows = [["scene_name", "settings_units_info_meters_scale", *names], ["ai_001_001", 0.5, *cam_from_uv.ravel()]]
    add("metadata_camera_parameters.csv", content="\n".join(",".join(map(str, row)) for row in rows))
    rotations, centres = [WORLD_FROM_OPENGL[:3, :3]] * 2, [[2.0, 4.0, 6.0]] * 2
    for what, values in (("frame_indices", [7, 8]), ("positions", centres), ("orientations", rotations)):
        file = raw / f"ai_001_001/_detail/cam_00/camera_keyframe_{what}.hdf5"
        file.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(file, "w") as archive:
            archive["dataset"] = values
    scene = found("hypersim")
    assert scene.poses("ai_001_001")[0] is None
    pose, (fx, fy, cx, cy) = scene.poses("ai_001_001")[1], scene.intrinsics("ai_001_001")[1]
    assert is_camera(pose) == (not tilt)
    assert np.allclose([fx, fy, cx, cy], [20, 20, 20, 10], rtol=1e-5)
    # The ray of the pixel (30, 5), u = v = 0.5, is projected back to it.
    ray = WORLD_FROM_OPENGL[:3, :3] @ cam_from_uv @ [0.5, 0.5, 1]
    x, y, z, _ = pose @ [*([1, 2, 3] + 3 * ray), 1]
    assert z > 0
    assert np.allclose((fx * x / z + cx, fy * y / z + cy), (30, 5), atol=1e-3)
    assert scene.depths("ai_001_001") == [None, depth]
    assert scene.depth_formats("ai_001_001") == {DepthFormat("hdf5", 1.0, "ray")}


def test_wildrgbd(add, found):
    folder = "apple/scenes/scene_001"
    for scene, frames in (("scene_001", 24), ("scene_010", 23), ("scene_002", 30)):
        add(*(f"apple/scenes/{scene}/rgb/{i:05d}.png" for i in range(frames)))
    add(f"{folder}/depth/00001.png", f"{folder}/masks/00002.png", "ball/notes.txt")
    numbers = " ".join(map(str, WORLD_FROM_CAMERA.ravel()))
    add(f"{folder}/cam_poses.txt", content=f"3 {numbers}\n0 {' '.join(map(str, np.eye(4).ravel()))}\n")
    # K is stored column by column.
    add(f"{folder}/metadata", content=json.dumps({"w": 480, "h": 640, "K": [500, 0, 0, 0, 510, 0, 240, 320, 1]}))
    paper, name = found("wildrgbd"), "apple/scene_001"
    assert paper.lengths == {"apple/scene_001": 24, "apple/scene_002": 30}
    assert paper.sequences[name] == [f"{folder}/rgb/{i:05d}.png" for i in range(24)]
    assert found("wildrgbd", rule="released").sequences == paper.sequences
    assert found("wildrgbd", min_frames=23).lengths["apple/scene_010"] == 23
    assert [is_camera(pose) for pose in paper.poses(name)[:4]] == [False, False, False, True]
    assert np.allclose(paper.poses(name)[0], np.eye(4))
    assert paper.poses(name)[1] is None
    assert paper.intrinsics(name)[23].tolist() == [500, 510, 240, 320]
    assert paper.depths(name)[:3] == [None, f"{folder}/depth/00001.png", None]
    assert paper.depth_formats(name) == {DepthFormat("png16", 1e-3, "z")}
    assert paper.masks(name)[:3] == [None, None, f"{folder}/masks/00002.png"]
    add(f"{folder}/cam_poses.txt", content="1 2 3\n")
    fails_in_one_line(found, "wildrgbd", r"cam_poses\.txt' cannot be read as poses")


def test_rendered_scenes(add, found):
    frames = [{"file": f"{i}.png", "depth": f"depth/{i}.png", "K": [[300, 0, 20], [0, 310, 10], [0, 0, 1]],
               "T_cam_world": CAMERA_FROM_WORLD} for i in range(2)]  # fmt: skip
    add("scene_0003/0.png", "scene_0003/1.png", "scene_0003/depth/1.png", "other/0.png")
    add("scene_0003/cameras.json", content=json.dumps({"depth_unit": 0.0005, "frames": frames}))
    scene = found("scenes")
    assert scene.sequences == {"scene_0003": ["scene_0003/0.png", "scene_0003/1.png"]}
    assert is_camera(scene.poses("scene_0003")[1])
    assert scene.intrinsics("scene_0003")[1].tolist() == [300, 310, 20, 10]
    assert scene.depths("scene_0003") == [None, "scene_0003/depth/1.png"]
    assert scene.depth_formats("scene_0003") == {DepthFormat("png16", 0.0005, "z")}
    add("scene_0003/cameras.json", content='{"frames": [{}]}')
    fails_in_one_line(found, "scenes", r"scene_0003/cameras\.json' cannot be read")


def test_imagenet(add, found):
    for prefix in ("", "train/"):
        images = [f"{prefix}n01440764/n01440764_{i}.JPEG" for i in (2, 18, 100)] + [f"{prefix}n01443537/a.JPEG"]
        add(*images, f"{prefix}n01440764/readme.txt")
        assert found("imagenet").sequences == {image: [image] for image in images}


def co3d(sequence, number, category="apple", **viewpoint):
    return {
        "sequence_name": sequence,
        "frame_number": number,
        "image": {"path": f"{category}/{sequence}/images/frame{number:06d}.jpg", "size": [200, 100]},
        "viewpoint": {"R": np.eye(3).tolist(), "T": [0, 0, 0], "focal_length": [2, 2], "principal_point": [0, 0],
                      "intrinsics_format": "ndc_isotropic"} | viewpoint,
    }  # fmt: skip


def annotate(raw, category, content):
    (raw / category).mkdir(exist_ok=True)
    content = content if isinstance(content, bytes) else gzip.compress(json.dumps(content).encode())
    (raw / category / "frame_annotations.jgz").write_bytes(content)


def test_co3d_takes_whole_sequences_of_at_least_24_frames(found, raw):
    long = [co3d("189_20393_38136", i) for i in range(30, 0, -1)]
    short = [co3d("110_13051_23361", i) for i in range(1, 24)]
    annotate(raw, "apple", long[:10] + short + long[10:])
    annotate(raw, "zebra", [co3d("1_2_3", i, "zebra") for i in range(1, 25)])
    (raw / "no_annotations").mkdir()
    expected = {
        "apple/189_20393_38136": [f"apple/189_20393_38136/images/frame{i:06d}.jpg" for i in range(1, 31)],
        "zebra/1_2_3": [f"zebra/1_2_3/images/frame{i:06d}.jpg" for i in range(1, 25)],
    }
    assert found("co3d").sequences == expected
    assert list(found("co3d", categories="seen").sequences) == ["apple/189_20393_38136"]
    assert len(SEEN) == 41
    assert found("co3d", min_frames=23).lengths["apple/110_13051_23361"] == 23
    assert found("co3d", poses=False).poses("zebra/1_2_3") == [None] * 24


def test_co3d_released_takes_the_training_split_of_41_categories(add, found, raw, caplog):
    for category in ("apple", "banana", "zebra"):
        annotate(raw, category, [co3d(name, i, category) for name in "abc" for i in range(1, 31)])
        listed = {"train": [[name, i, "path"] for name, n in (("a", 25), ("b", 23)) for i in range(1, n + 1)],
                  "test": [["c", i, "path"] for i in range(1, 31)]}  # fmt: skip
        if category != "banana":
            add(f"{category}/set_lists/set_lists_fewview_dev.json", content=json.dumps(listed))
    assert found("co3d", rule="released").lengths == {"apple/a": 25}
    assert "banana/set_lists" in caplog.text
    assert list(found("co3d", rule="released", categories="all").lengths) == ["apple/a", "zebra/a"]
    add("apple/set_lists/set_lists_fewview_dev.json", content='{"train": [["a", 1]]}')
    with pytest.raises(DataError, match=r"^[^\n]*apple/set_lists/[^\n]*cannot be read"):
        found("co3d", rule="released")


def test_co3d_cameras_depth_and_masks(add, found, raw):
    frames = [co3d("a", i, T=[i, 2 * i, 3]) for i in range(1, 25)]
    for i, each in enumerate(frames):
        path = f"apple/a/depths/frame{i}.jpg.geometric.png"
        each |= {"depth": {"path": path, "scale_adjustment": 1 + i}, "mask": {"path": f"apple/a/masks/frame{i}.png"}}
    frames[4]["viewpoint"] = frames[5]["depth"] = None
    add("apple/a/depths/frame3.jpg.geometric.png", "apple/a/masks/frame4.png")
    annotate(raw, "apple", frames)
    apple = found("co3d")
    poses, intrinsics = apple.poses("apple/a"), apple.intrinsics("apple/a")
    assert np.allclose(poses[1], [[-1, 0, 0, -2], [0, -1, 0, -4], [0, 0, 1, 3], [0, 0, 0, 1]])
    assert intrinsics[1].tolist() == [100, 100, 50, 100]
    assert poses[4] is intrinsics[4] is None
    assert apple.manifest.known == {"pose": 23, "intrinsics": 23, "depth": 1, "mask": 1}
    assert apple.depths("apple/a")[3] == "apple/a/depths/frame3.jpg.geometric.png"
    assert apple.depth_formats("apple/a") == {DepthFormat("co3d", 4.0, "z")}, "each frame has a separate unit"
    assert apple.masks("apple/a")[4] == "apple/a/masks/frame4.png"
    blank = gzip.compress(b"[" + b" " * 10_000)[:-8]
    for content in (b"", b"no gzip", gzip.compress(b"{"), gzip.compress(b'[{"a": 1}]'), blank):
        annotate(raw, "apple", content)
        fails_in_one_line(found, "co3d", r"apple/frame_annotations\.jgz' cannot be read as CO3D")
    annotate(raw, "apple", [co3d("a", 1, intrinsics_format="pixels")])
    fails_in_one_line(found, "co3d", "intrinsics_format 'pixels'")


def test_folders(add, found, raw, tmp_path, caplog):
    """Every folder with images, in natural order; folders of depth and masks, and what is hidden, are left out."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/0.png").touch()
    (raw / "link").symlink_to(tmp_path / "elsewhere")
    add("b10/10.png", "b10/9.jpg", "b10/1.PNG", "b9/images/x2.webp", "b9/images/x10.jpeg", "b9/notes.txt", "c/only.txt")
    add("0.png", "b10/depth/0.png", "b10/Masks/1.png", ".cache/0.png", "b10/.0.png")
    add("b9/@eaDir/x2.webp/thumb.jpg", "#recycle/old/0.jpg", "$RECYCLE.BIN/0.jpg", "b10/Thumbnails/0.jpg")
    add("__MACOSX/b10/._1.PNG", "System Volume Information/0.jpg", "lost+found/0.jpg", ".Trash-1000/files/0.jpg")
    add("b9/@__thumb/0.jpg", "Network Trash Folder/0.jpg", "~snapshot/hourly.0/b9/0.jpg", "FOUND.000/0.jpg")
    add("run/config.yaml", "run/metrics.jsonl", "run/pictures/step_0000001.png", "run/reconstruction.png")
    add(
        "eval/table.md", "eval/report.html", "eval/views-a-b.json", "eval/views-a-b-0.jpg", "c/m.arrow", "c/m_sheet.jpg"
    )
    add("f.npz", "f_pictures/b10/9.png")
    (raw / "b10/folder.jpg").mkdir()
    for link, target in (("b10/gone.jpg", "nowhere"), ("b10/circle.jpg", "circle.jpg"), ("b10/up", ".."), ("b8", "b9"),
                         ("above", tmp_path), ("z7", raw / "link"), ("x1", "x2"), ("x2", "x1")):  # fmt: skip
        (raw / link).symlink_to(target)
    sequences = {
        "raw": ["0.png"],
        "b9/images": ["b9/images/x2.webp", "b9/images/x10.jpeg"],
        "b10": ["b10/1.PNG", "b10/9.jpg", "b10/10.png"],
        "link": ["link/0.png"],
    }
    with caplog.at_level(logging.INFO):
        assert list(found("folder").sequences.items()) == list(sequences.items())
    for counted in ("2 folders of depth", "2 hidden folders", "11 folders of thumbnails", "2 folders that fastmum",
                    "3 pictures that fastmum drew", "4 links to folders", "2 broken links"):  # fmt: skip
        assert counted in caplog.text
    assert found("folder", rule="released").sequences == sequences
    assert list(found("folder", min_frames=2).sequences) == ["b9/images", "b10"]
    assert found("folder", single=True).sequences == {name: [name] for names in sequences.values() for name in names}


def test_folders_of_other_formats_are_named(add, found, raw, caplog):
    add("a/1.HEIC", "a/2.heic", "b/3.dng")
    with pytest.raises(DataError, match=rf"'{raw}' are 1 \.dng, 2 \.heic"):
        found("folder")
    add("a/4.avif", "a/5.png", "a/6.PNG")
    with caplog.at_level(logging.INFO):
        assert found("folder").sequences == {"a": ["a/4.avif", "a/5.png", "a/6.PNG"]}
    assert "1 .avif, 2 .png" in caplog.text
    assert "1 .dng, 2 .heic" in caplog.text
