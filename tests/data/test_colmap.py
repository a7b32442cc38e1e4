import shutil
import sys

import numpy as np
import pytest
from colmap_files import View, convert_to_binary, write_text_model

from fastmum.data.colmap import read_model
from fastmum.data.errors import DataError

VIEWS = {"b.jpg": View((7, 3, 9), 90), "sub/a.jpg": View((9, 3, 3)), "c.jpg": View(())}


def seen(model):
    return [sorted(model.points[model.images == i].tolist()) for i in range(len(model.names))]


@pytest.fixture(params=["text", "binary", "binary with rigs"])
def folder(request, tmp_path):
    folder = write_text_model(tmp_path / "model", VIEWS)
    pytest.importorskip("pycolmap")
    return folder if request.param == "text" else convert_to_binary(folder, rigs=request.param != "binary")


def test_images_points_and_cameras_by_hand(folder):
    model = read_model(folder)
    assert model.names == ("b.jpg", "sub/a.jpg", "c.jpg")
    assert seen(model) == [[0, 1, 2], [0, 0, 2], []]  # points 3, 7 and 9
    assert model.intrinsics.tolist() == [[500, 510, 320, 240]] * 3
    quarter = [[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 1], [0, 0, 0, 1]]  # x_camera = z_world, z_camera = 1 - x_world
    assert model.poses[0] == pytest.approx(np.array(quarter), abs=1e-12)
    assert model.poses[1] == pytest.approx(np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]))


def test_binary_files_come_first(tmp_path):
    folder = convert_to_binary(write_text_model(tmp_path / "model", VIEWS))
    for file in write_text_model(tmp_path / "other", {"other.jpg": View((1,))}).iterdir():
        shutil.copy(file, folder)
    assert read_model(folder).names[0] == "b.jpg"


def test_selected_images_are_numbered_anew(folder):
    model = read_model(folder).select(np.array([False, True, True]))
    assert model.names == ("sub/a.jpg", "c.jpg")
    assert seen(model) == [[0, 0, 2], []]
    assert len(model.poses) == len(model.intrinsics) == 2


@pytest.mark.parametrize(
    ("camera", "expected"),
    [
        ("SIMPLE_PINHOLE 640 480 500 320 240", [500, 500, 320, 240]),
        ("OPENCV 640 480 500 510 320 240 .1 .2 .3 .4", [500, 510, 320, 240]),
        ("SIMPLE_RADIAL_FISHEYE 640 480 500 320 240 .1", [500, 500, 320, 240]),
    ],
)
def test_camera_models(tmp_path, camera, expected):
    pytest.importorskip("pycolmap")
    folder = write_text_model(tmp_path / "model", VIEWS)
    (folder / "cameras.txt").write_text(f"1 {camera}\n")
    assert read_model(folder).intrinsics.tolist() == [expected] * 3


def test_a_panorama_has_no_focal_length(tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    if "EQUIRECTANGULAR" not in pycolmap.CameraModelId.__members__:
        pytest.skip("this pycolmap knows no panoramas")
    folder = write_text_model(tmp_path / "model", VIEWS)
    (folder / "cameras.txt").write_text("1 EQUIRECTANGULAR 640 320 640 320\n")
    assert np.isnan(read_model(folder).intrinsics).all()


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


@pytest.mark.parametrize("part", ["cameras", "images", "points3D"])
def test_broken_files_end_in_one_line(folder, part):
    file = next(folder.glob(f"{part}.*"))
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert "copy it again" in one_line(folder)


@pytest.mark.parametrize("change", [slice(7), slice(8), slice(60), slice(-8), None])
def test_points_of_another_length_are_noticed(tmp_path, change):
    # pycolmap would read on until memory is full.
    folder = convert_to_binary(write_text_model(tmp_path / "model", VIEWS))
    content = (folder / "points3D.bin").read_bytes()
    (folder / "points3D.bin").write_bytes(content[change] if change else content + bytes(8))
    assert "points3D.bin' is not a whole COLMAP file" in one_line(folder)


def test_points_cut_off_are_noticed(tmp_path):
    # pycolmap reads such a file without a word.
    pytest.importorskip("pycolmap")
    folder = write_text_model(tmp_path / "model", VIEWS)
    lines = (folder / "points3D.txt").read_text().splitlines()
    (folder / "points3D.txt").write_text(lines[0] + "\n")
    assert "its images see 3 points, but it has 1" in one_line(folder)


def test_without_pycolmap_the_extra_is_named(tmp_path, monkeypatch):
    folder = write_text_model(tmp_path / "model", VIEWS)
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    with pytest.raises(DataError, match=r"^reading COLMAP models needs pycolmap: pip install 'fastmum\[colmap\]'$"):
        read_model(folder)


@pytest.mark.parametrize("scene", ["door_lund", "fox"])
def test_real_models_are_the_same_as_text_and_binary(shared, scene):
    pytest.importorskip("pycolmap")
    binary = read_model(shared / "data/colmap" / scene / "sparse/0")
    text = read_model(shared / "data/colmap" / scene / "sparse_txt/0")
    assert binary.names == text.names
    assert seen(binary) == seen(text)
    assert text.poses == pytest.approx(binary.poses, abs=1e-6)
    assert text.intrinsics == pytest.approx(binary.intrinsics)
