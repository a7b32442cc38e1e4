"""Every data set with depth and cameras, on a miniature of its layout: the world point of a pixel, computed by hand.

Images have 8 x 4 pixels. The camera is at (1, 2, 3) and looks along the world's +x: its x is the world's -z, its y the
world's y. Focal lengths are 4 px, the principal point is (4, 2). The centre of row 1, column 2 is (2.5, 1.5), its ray
(-0.375, -0.125, 1), its z-depth 2; so it shows the world's (1 + 2, 2 - 0.25, 3 + 0.75). Row 0, column 0 is unknown.
"""

import gzip
import importlib.util
import json

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

import fastmum.data.build as builds
from fastmum.data.builders import BUILDERS
from fastmum.data.builders.sfm import near_origin
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests
from fastmum.data.pair_loader import PairLoader
from fastmum.data.pair_plan import GAPS, DistantPairs, ListedPairs, PairPlanner
from fastmum.data.samples import manifest_frame
from fastmum.geometry.camera import rigid_inverse, transform, unproject

POINT = (3.0, 1.75, 3.75)
CAMERA_FROM_WORLD = np.array([[0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]], float)
WORLD_FROM_CAMERA = np.linalg.inv(CAMERA_FROM_WORLD)
K = np.array([[4, 0, 4], [0, 4, 2], [0, 0, 1]], float)
Z = np.full((4, 8), 7.0, np.float32)
Z[0, 0], Z[1, 2] = 0, 2
RAY_LENGTH = np.sqrt(0.375**2 + 0.125**2 + 1)


def text(array):
    return "\n".join(" ".join(map(str, row)) for row in np.atleast_2d(array).tolist()) + "\n"


def put(raw, name, content):
    """Write a text, bytes, an image of 8 x 4 pixels (None), an 8- or 16-bit map, or arrays by their suffix."""
    file = raw / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        Image.fromarray(np.full((4, 8, 3), 90, np.uint8)).save(file)
    elif isinstance(content, str | bytes):
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    elif file.suffix == ".png":
        Image.fromarray(content if content.dtype == np.uint8 else np.rint(content).astype(np.uint16)).save(file)
    elif file.suffix in (".h5", ".hdf5"):
        with pytest.importorskip("h5py").File(file, "w") as archive:
            for key, value in content.items():
                archive[key] = value
    elif file.suffix == ".exr":
        exr = pytest.importorskip("OpenEXR", reason="OpenEXR is not installed: pip install 'fastmum[exr]'")
        exr.File({"type": exr.scanlineimage, "compression": exr.ZIP_COMPRESSION}, content).write(str(file))
    elif file.suffix == ".npy":
        np.save(file, content)
    else:
        np.savez(file, **content)


def colmap_model(raw, folder, names):
    """All images have one camera and see the point, and another one behind them."""
    x, y, z, w = Rotation.from_matrix(CAMERA_FROM_WORLD[:3, :3]).as_quat().tolist()
    pose = f"{w} {x} {y} {z} {text(CAMERA_FROM_WORLD[:3, 3])}".strip()
    lines = [f"{i} {pose} 1 {name}\n2.5 1.5 7 0.5 0.5 8\n" for i, name in enumerate(names, 1)]
    put(raw, f"{folder}/cameras.txt", "1 PINHOLE 8 4 4 4 4 2\n")
    put(raw, f"{folder}/images.txt", "".join(lines))
    put(raw, f"{folder}/points3D.txt", f"7 {text(POINT).strip()} 0 0 0 0.1 1 0 2 0\n8 -5 2 3 0 0 0 0.1 1 1 2 1\n")


def megadepth(raw):
    colmap_model(raw, "Undistorted_SfM/0001/sparse-txt", ["a.jpg", "b.jpg"])
    for name in "ab":
        put(raw, f"Undistorted_SfM/0001/images/{name}.jpg", None)
        # Files below 100 kB are no depth maps.
        content = {"depth": Z, "padding": np.zeros(30_000, np.float32)}
        put(raw, f"phoenix/S6/zl548/MegaDepth_v1/0001/dense0/depths/{name}.h5", content)


def colmap(raw):
    colmap_model(raw, "sparse/0", ["a.jpg", "b.jpg"])
    for name in "ab":
        put(raw, f"images/{name}.jpg", None)


def colmap_dense(raw):
    colmap(raw)
    for name in "ab":
        put(raw, f"stereo/depth_maps/{name}.jpg.geometric.bin", b"8&4&1&" + Z.tobytes())


def scannet(raw):
    for i in range(3):
        put(raw, f"scene0001_00/color/{i}.jpg", None)
        put(raw, f"scene0001_00/depth/{i}.png", Z * 1000)
        # Tracking was lost in the first frame.
        put(raw, f"scene0001_00/pose/{i}.txt", text(WORLD_FROM_CAMERA if i else WORLD_FROM_CAMERA - np.inf))
    put(raw, "scene0001_00/intrinsic/intrinsic_color.txt", text(np.pad(K, (0, 1))))
    put(raw, "scene0001_00/intrinsic/intrinsic_depth.txt", text(np.pad(2 * K, (0, 1))))


def vkitti2(raw):
    drive = "Scene01/15-deg-left"
    for i in range(2):
        put(raw, f"{drive}/frames/rgb/Camera_1/rgb_{i:05d}.jpg", None)
        put(raw, f"{drive}/frames/depth/Camera_1/depth_{i:05d}.png", np.where(Z > 0, Z * 100, 65535))
    other = text(np.eye(4).ravel()).strip()
    pose = text(CAMERA_FROM_WORLD.ravel()).strip()
    put(raw, f"{drive}/extrinsic.txt", "frame cameraID r1,1\n" + f"0 0 {other}\n0 1 {pose}\n1 0 {other}\n1 1 {pose}\n")
    put(raw, f"{drive}/intrinsic.txt", "frame cameraID K[0,0]\n0 0 1 1 1 1\n0 1 4 4 3.5 1.5\n1 1 4 4 3.5 1.5\n")


def mvssynth(raw):
    left_handed = CAMERA_FROM_WORLD @ np.diag([1, -1, 1, 1])
    camera = {"f_x": 4, "f_y": 4, "c_x": 4, "c_y": 2, "extrinsic": left_handed.tolist()}
    for i in range(2):
        put(raw, f"GTAV_540/0000/images/{i:04d}.png", None)
        put(raw, f"GTAV_540/0000/depths/{i:04d}.exr", {"Z": np.where(Z > 0, Z, np.float32(np.inf))})
        put(raw, f"GTAV_540/0000/poses/{i:04d}.json", json.dumps(camera))


def blendedmvs(raw):
    for i in range(2):
        put(raw, f"5a/blended_images/{i:08d}.jpg", None)
        put(raw, f"5a/rendered_depth_maps/{i:08d}.pfm", b"Pf\n8 4\n-1.0\n" + Z[::-1].tobytes())
        put(raw, f"5a/cams/{i:08d}_cam.txt", f"extrinsic\n{text(CAMERA_FROM_WORLD)}\nintrinsic\n{text(K)}\n1 2 3 4\n")


def pointodyssey(raw):
    for i in range(2):
        put(raw, f"train/ani/rgbs/rgb_{i:05d}.jpg", None)
        put(raw, f"train/ani/depths/depth_{i:05d}.png", Z * 65535 / 1000)
    put(raw, "train/ani/anno.npz", {"intrinsics": np.stack([K, K]), "extrinsics": np.stack([CAMERA_FROM_WORLD] * 2)})


def hypersim(raw):
    """Positions are in half metres, rays in OpenGL's axes; distances are along the rays."""
    names = [f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3)]
    columns = ["scene_name", "settings_units_info_meters_scale", *names]
    for scene in ("ai_001_001", "ai_024_012"):
        values = [scene, 0.5, 1, 0, 0, 0, 0.5, 0, 0, 0, -1]
        rows = [",".join(map(str, row)) for row in (columns, values)]
        for i in range(2):
            stem = f"{scene}/images/scene_cam_00_{{}}/frame.{i:04d}"
            put(raw, stem.format("final_preview") + ".tonemap.jpg", None)
            distance = np.where(Z > 0, Z * RAY_LENGTH, np.nan)
            put(raw, stem.format("geometry_hdf5") + ".depth_meters.hdf5", {"dataset": distance})
        poses = WORLD_FROM_CAMERA * [1, -1, -1, 1]
        for what, value in (("frame_indices", [0, 1]), ("orientations", [poses[:3, :3]] * 2),
                            ("positions", [2 * poses[:3, 3]] * 2)):  # fmt: skip
            put(raw, f"{scene}/_detail/cam_00/camera_keyframe_{what}.hdf5", {"dataset": value})
    put(raw, "metadata_camera_parameters.csv", "\n".join([rows[0], rows[1].replace(scene, "ai_001_001")]))


def wildrgbd(raw):
    for category in ("apple", "chair"):
        folder = f"{category}/scenes/scene_001"
        for i in range(2):
            put(raw, f"{folder}/rgb/{i:05d}.png", None)
            put(raw, f"{folder}/depth/{i:05d}.png", Z * 1000)
            put(raw, f"{folder}/masks/{i:05d}.png", np.uint8(255 * (Z == 2)))
        put(raw, f"{folder}/cam_poses.txt", "".join(f"{i} {text(WORLD_FROM_CAMERA.ravel())}" for i in range(2)))
        put(raw, f"{folder}/metadata", json.dumps({"K": K.T.ravel().tolist()}))


def co3d(raw):
    """Row vectors, x to the left and y up; the unit of stored depth is 0.5."""
    flip = np.diag([-1, -1, 1])
    R, T = (flip @ CAMERA_FROM_WORLD[:3, :3]).T, flip @ CAMERA_FROM_WORLD[:3, 3]
    viewpoint = {"R": R.tolist(), "T": T.tolist(), "focal_length": [2, 2], "principal_point": [0, 0],
                 "intrinsics_format": "ndc_isotropic"}  # fmt: skip
    frames = []
    for i in range(2):
        image, depth = f"apple/1_2_3/images/frame{i:06d}.jpg", f"apple/1_2_3/depths/frame{i:06d}.jpg.geometric.png"
        put(raw, image, None)
        put(raw, depth, (2 * Z).astype(np.float16).view(np.uint16))
        put(raw, f"apple/1_2_3/depth_masks/frame{i:06d}.png", np.uint8(255 * (Z == 2)))
        frames.append({"sequence_name": "1_2_3", "frame_number": i, "image": {"path": image, "size": [4, 8]},
                       "depth": {"path": depth, "scale_adjustment": 0.5}, "viewpoint": viewpoint})  # fmt: skip
    put(raw, "apple/frame_annotations.jgz", gzip.compress(json.dumps(frames).encode()))


def scenes(raw):
    frames = []
    for i in range(2):
        put(raw, f"scene_0000/{i}.png", None)
        put(raw, f"scene_0000/depth/{i}.png", Z * 2000)
        names = {"file": f"{i}.png", "depth": f"depth/{i}.png"}
        frames.append(names | {"K": K.tolist(), "T_cam_world": CAMERA_FROM_WORLD.tolist()})
    put(raw, "scene_0000/cameras.json", json.dumps({"depth_unit": 0.0005, "frames": frames}))


def rgbd(raw, suffix=".png", values=Z * 1000, poses=WORLD_FROM_CAMERA):
    for i in range(2):
        put(raw, f"kitchen/rgb/{i}.jpg", None)
        put(raw, f"kitchen/depth/{i}{suffix}", {"depth": values} if suffix in (".npz", ".h5") else values)
        put(raw, f"kitchen/pose/{i}.txt", text(poses))
    put(raw, "kitchen/intrinsics.txt", text(K))


def rgbd_ray(raw):
    rgbd(raw, ".npz", Z * RAY_LENGTH * 100, CAMERA_FROM_WORLD)
    put(raw, "kitchen/intrinsics.txt", "4 4 4 2\n")


def rgbd_nerfstudio(raw):
    rgbd(raw, ".npy", Z)
    frame = {"transform_matrix": (WORLD_FROM_CAMERA * [1, -1, -1, 1]).tolist()}
    frames = [frame | {"file_path": f"rgb/{i}.jpg"} for i in range(2)]
    camera = {"w": 8, "h": 4, "fl_x": 4, "fl_y": 4, "cx": 4, "cy": 2}
    put(raw, "kitchen/transforms.json", json.dumps(camera | {"frames": frames}))


def realestate10k(raw):
    pose = text((CAMERA_FROM_WORLD[:3]).ravel()).strip()
    lines = [f"{1000 * i} 0.5 1 0.5 0.5 0 0 {pose}\n" for i in range(2)]
    put(raw, "train/a1.txt", "https://youtube\n" + "".join(lines))
    for i in range(2):
        put(raw, f"train/a1/{1000 * i}.png", None)


def dl3dv(raw):
    opengl = (WORLD_FROM_CAMERA * [1, -1, -1, 1]).tolist()
    frames = [{"file_path": f"images/frame_{i:05d}.png", "transform_matrix": opengl} for i in range(2)]
    camera = {"w": 8, "h": 4, "fl_x": 4, "fl_y": 4, "cx": 4, "cy": 2}
    put(raw, "1K/abc/transforms.json", json.dumps(camera | {"frames": frames}))
    for i in range(2):
        put(raw, f"1K/abc/images_8/frame_{i:05d}.png", None)


@pytest.mark.parametrize(
    ("write", "options", "by_overlap"),
    [
        (megadepth, {"sequences": 1}, True),
        (blendedmvs, {"chunk": 0}, True),
        (scannet, {"chunk": 0}, False),
        (wildrgbd, {"min_frames": 2, "exclude": "chair"}, False),
        (vkitti2, {}, False),
        (realestate10k, {"chunk": 0}, False),
        (dl3dv, {}, False),
    ],
)
def test_pairs_of_the_training_sets_of_relative_pose(raw, tmp_path, monkeypatch, write, options, by_overlap):
    monkeypatch.setenv("FASTMUM_CACHE", str(tmp_path / "cache"))
    write(raw)
    name = write.__name__
    builds.build(name, raw, tmp_path / "all.arrow", **options)
    manifests = Manifests([tmp_path / "all.arrow"])
    # Miniatures have two frames, with one camera: all of the one is seen by the other.
    gaps = None if by_overlap or GAPS[name][0] == 1 else {name: (1, 500)}
    planner = PairPlanner(manifests, None, 2, (4, 4), overlap=(0.9, 1.0), gaps=gaps, augment=False)
    assert isinstance(planner.pairs[0], ListedPairs if by_overlap else DistantPairs)
    plan = planner.plan(0)
    assert {*map(tuple, plan.rows.reshape(-1, 2).tolist())} <= {(0, 1), (1, 0)}
    batch = PairLoader((planner, None), 1).load(plan)
    assert batch.images.shape == (4, 4, 4, 3)
    assert np.allclose(batch.camera_from_world, CAMERA_FROM_WORLD, atol=1e-5)


@pytest.mark.parametrize(
    ("write", "options", "tolerance"),
    [
        (megadepth, {"sequences": 1}, 1e-5),
        (scannet, {}, 1e-5),
        (vkitti2, {}, 1e-5),
        (mvssynth, {}, 1e-5),
        (blendedmvs, {}, 1e-5),
        (pointodyssey, {}, 1e-2),  # 15 mm a step
        (hypersim, {"exclude": "ai_024_012,ai_026_008"}, 1e-5),
        (wildrgbd, {"min_frames": 2, "exclude": "chair"}, 1e-5),
        (co3d, {"min_frames": 2}, 1e-5),
        (scenes, {}, 1e-5),
        (colmap, {"sequences": 1, "sparse_depth": True}, 1e-5),
        (colmap_dense, {"sequences": 1}, 1e-5),
        (rgbd, {}, 1e-5),
        (rgbd_ray, {"kind": "ray", "unit": 0.01, "pose": "camera_from_world"}, 1e-5),
        (rgbd_nerfstudio, {}, 1e-5),
    ],
)
def test_the_world_point_of_a_pixel(raw, tmp_path, write, options, tolerance):
    write(raw)
    name = next(name for name in (write.__name__, write.__name__.partition("_")[0]) if name in BUILDERS)
    counts = builds.build(name, raw, tmp_path / "lists/all.arrow", **options).counts
    assert counts == (1, 2)
    manifests = Manifests([tmp_path / "lists/all.arrow"])
    for row in range(2):
        view = manifest_frame(manifests, row).view()
        assert view.size == view.camera.size == (8, 4)
        assert abs(view.depth[1, 2] - 2) <= tolerance * 2
        assert view.depth[0, 0] == 0
        world = transform(rigid_inverse(view.camera.camera_from_world), unproject(view.depth, view.camera.K))
        assert np.allclose(world[1, 2], POINT, atol=2 * tolerance)
        assert view.mask is None or view.mask.sum() == 1


def test_mvssynth_squashes_its_540p_copy_and_hypersim_has_cameras_without_a_centre(raw, tmp_path, caplog):
    for i in range(2):
        put(raw, f"0000/images/{i}.png", None)
        Image.new("RGB", (810, 540)).save(raw / f"0000/images/{i}.png")
        camera = {"f_x": 1920, "f_y": 500, "c_x": 405, "c_y": 270, "extrinsic": np.eye(4).tolist()}
        put(raw, f"0000/poses/{i}.json", json.dumps(camera))
    builds.build("mvssynth", raw, tmp_path / "a.arrow")
    assert Manifests([tmp_path / "a.arrow"]).camera_arrays(0)[0].tolist() == [810, 500, 405, 270]
    if importlib.util.find_spec("h5py"):
        hypersim(raw)
        file = raw / "metadata_camera_parameters.csv"
        file.write_text(file.read_text().replace("1,0,0,0,0.5", "1,0,-3,0,0.5"))
        builds.build("hypersim", raw, tmp_path / "b.arrow", exclude="ai_024_012")
        assert Manifests([tmp_path / "b.arrow"]).camera_arrays(0)[0] is None
        assert "ai_001_001" in caplog.text


def one_line(raw, tmp_path, match, **options):
    with pytest.raises(DataError, match=rf"^[^\n]*{match}[^\n]*$"):
        builds.build("rgbd", raw, tmp_path / "a.arrow", **options)


def test_folders_of_users_with_faults_are_named_in_one_line(raw, tmp_path, caplog):
    rgbd(raw)
    put(raw, "kitchen/depth/stray.png", Z)
    put(raw, "kitchen/rgb/2.jpg", None)
    builds.build("rgbd", raw, tmp_path / "a.arrow")
    assert "'stray.png'" in caplog.text
    assert "1 of 3 frames have no depth" in caplog.text
    assert Manifests([tmp_path / "a.arrow"]).depth_file(2) is None

    put(raw, "kitchen/depth/1.png", Z)  # in metres, next to one in millimetres
    one_line(raw, tmp_path, "depth/1.png.*mixed")
    builds.build("rgbd", raw, tmp_path / "a.arrow", depth=False)
    (raw / "kitchen/depth/1.png").unlink()
    put(raw, "kitchen/depth/1.npy", Z)
    one_line(raw, tmp_path, "several formats")
    rgbd(raw, ".npy", Z * 1000)
    for i in range(2):
        (raw / f"kitchen/depth/{i}.png").unlink(missing_ok=True)
    one_line(raw, tmp_path, "--unit")
    assert builds.build("rgbd", raw, tmp_path / "a.arrow", unit=0.001).counts.frames == 3
    put(raw, "kitchen/poses.txt", text(np.eye(4).ravel()))
    one_line(raw, tmp_path, "poses.txt' has 1 poses for 3 images", unit=0.001)
    (raw / "kitchen/poses.txt").unlink()
    put(raw, "kitchen/pose/0.txt", "1 2 3\n")
    one_line(raw, tmp_path, "pose/0.txt", unit=0.001)
    for file in (raw / "kitchen/rgb").iterdir():
        file.rename(file.with_stem(f"frame_{file.stem}"))
    one_line(raw, tmp_path, "no depth map in")


def test_georeferenced_models_keep_their_relative_poses():
    """In float32, steps at 5e6 are half a unit."""
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec([[0.1, 0.2, 0.3], [0.3, 0.1, 0], [0, 0, 0.5]]).as_matrix()
    near = poses.copy()
    near[:, :3, 3] = [[0, 0, 0], [0.1, 0.2, 0.3], [-0.4, 0, 0.1]]
    far = near.copy()
    far[:, :3, 3] -= near[:, :3, :3] @ [5e5, 5e6, 100.0]
    kept = near_origin(far).astype(np.float32)
    assert np.allclose(kept[1:] @ np.linalg.inv(kept[0]), near[1:] @ np.linalg.inv(near[0]), atol=1e-6)
    assert near_origin(near) is near
