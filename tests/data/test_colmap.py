"""Reading COLMAP models, as text and binary, against values by hand and against pycolmap."""

import shutil

import numpy as np
import pytest
from colmap_files import View, convert_to_binary, write_text_model

from fastmum.data.colmap import CAMERAS, read_model
from fastmum.data.errors import DataError

VIEWS = {"b.jpg": View((7, 3, 9), 90), "sub/a.jpg": View((9, 3, 3)), "c.jpg": View(())}


def seen(model):
    return [sorted(model.points[model.images == i].tolist()) for i in range(len(model.names))]


@pytest.fixture(params=["text", "binary", "binary with rigs"])
def folder(request, tmp_path):
    folder = write_text_model(tmp_path / "model", VIEWS)
    return folder if request.param == "text" else convert_to_binary(folder, rigs=request.param != "binary")


def test_images_points_and_cameras_by_hand(folder):
    model = read_model(folder)
    assert model.names == ("b.jpg", "sub/a.jpg", "c.jpg")
    assert seen(model) == [[0, 1, 2], [0, 0, 2], []]  # points 3, 7 and 9
    assert model.intrinsics.tolist() == [[500, 510, 320, 240]] * 3
    quarter = [[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 1], [0, 0, 0, 1]]  # x_camera = z_world, z_camera = 1 - x_world
    assert model.poses[0] == pytest.approx(np.array(quarter), abs=1e-12)
    assert model.poses[1] == pytest.approx(np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]))
    some = model.select(np.array([False, True, True]))
    assert some.names == ("sub/a.jpg", "c.jpg")
    assert seen(some) == [[0, 0, 2], []]
    assert len(some.poses) == len(some.intrinsics) == 2


def test_binary_files_come_first(tmp_path):
    folder = convert_to_binary(write_text_model(tmp_path / "model", VIEWS))
    for file in write_text_model(tmp_path / "other", {"other.jpg": View((1,))}).iterdir():
        shutil.copy(file, folder)
    assert read_model(folder).names[0] == "b.jpg"


def test_rotations_are_those_of_pycolmap(tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    quaternions = np.random.default_rng(0).normal(size=(5, 4))
    folder = write_text_model(tmp_path / "model", {f"{i}.jpg": View((1,)) for i in range(5)})
    lines = [f"{i + 1} {' '.join(map(str, q))} 1 2 3 1 {i}.jpg\n\n" for i, q in enumerate(quaternions)]
    (folder / "images.txt").write_text("".join(lines))
    poses = [pycolmap.Rotation3d((q / np.linalg.norm(q))[[1, 2, 3, 0]]).matrix() for q in quaternions]
    assert read_model(folder).poses[:, :3, :3] == pytest.approx(np.array(poses))


def test_camera_models(tmp_path):
    """Every model that pycolmap knows, with parameters 1, 2, 3 ..."""
    pycolmap = pytest.importorskip("pycolmap")
    for number, (name, count, focal) in enumerate(CAMERAS):
        if name not in pycolmap.CameraModelId.__members__:
            continue  # of a newer COLMAP
        camera = pycolmap.Camera(model=name, width=640, height=480, params=np.arange(1.0, count + 1))
        fx, fy, cx, cy = [np.nan] * 4
        if focal:
            fx, fy = camera.focal_length_x, camera.focal_length_y
            cx, cy = camera.principal_point_x, camera.principal_point_y
        folder = write_text_model(tmp_path / name, {"a.jpg": View((1,))})
        (folder / "cameras.txt").write_text(f"1 {name} 640 480 {' '.join(map(str, camera.params))}\n")
        assert int(pycolmap.CameraModelId.__members__[name]) == number
        for model in (read_model(folder), read_model(convert_to_binary(folder))):
            assert np.array_equal(model.intrinsics, [[fx, fy, cx, cy]], equal_nan=True), name


def one_line(folder):
    with pytest.raises(DataError) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_missing_files_are_named(folder):
    suffix = next(folder.iterdir()).suffix
    (folder / f"points3D{suffix}").write_bytes(b"")
    (folder / f"cameras{suffix}").unlink()
    assert f"cameras{suffix}, points3D{suffix} missing or empty" in one_line(folder)
    shutil.rmtree(folder)
    assert "No such file" in one_line(folder)


def test_broken_files_end_in_one_line(folder):
    for part in ("images", "cameras"):
        file = next(folder.glob(f"{part}.*"))
        whole = file.read_bytes()
        for content in (b"\xff" * len(whole), whole[: len(whole) // 2], whole + b"1 2 3 4 5 6 7 8"):
            file.write_bytes(content)
            assert f"{part}{file.suffix}" in one_line(folder)
        file.write_bytes(whole)
