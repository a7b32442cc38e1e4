"""Frames of manifests: image, depth, mask and camera read together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plane_world import Shot, shot

from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests, SequenceRecord, write_manifest
from fastmum.data.samples import Frame, image_size, manifest_frame, read_rgb
from fastmum.geometry.camera import pixel_rays, rigid_inverse, transform, unproject
from fastmum.geometry.crop import crop_resize, flip

SHOTS = [shot(), shot((0.3, 0.1, 0.2), (0.1, -0.1, 0.2))]


def write(root: Path, kind: str = "z", scale: int = 1, **options) -> Manifests:
    """Two shots of the wall with depth in millimetres at `scale` times the resolution, and masks of their left half."""
    names = [f"{i}.png" for i in range(2)]
    for name, camera in zip(names, SHOTS, strict=True):
        width, height = camera.size
        fine = Shot(np.diag([scale, scale, 1]) @ camera.K, camera.T, (scale * width, scale * height))
        depth = fine.depth().astype(np.float64)
        if kind == "ray":
            depth *= np.linalg.norm(pixel_rays(fine.K, depth.shape), axis=-1)
        camera.image().save(root / name)
        Image.fromarray(np.rint(1000 * depth).astype(np.uint16)).save(root / f"depth_{name}")
        Image.fromarray(np.uint8(255 * (np.mgrid[:height, :width][1] < width // 2))).save(root / f"mask_{name}")
    record = {
        "poses": np.stack([camera.T for camera in SHOTS]).astype(np.float32),
        "intrinsics": np.array([camera.K[[0, 1, 0, 1], [0, 1, 2, 2]] for camera in SHOTS], np.float32),
        "depths": [f"depth_{name}" for name in names],
        "masks": [f"mask_{name}" for name in names],
        "depth_format": DepthFormat("png16", 1e-3, kind),
    }
    sequence = SequenceRecord("wall", names, **record | options)
    write_manifest(root / "wall.arrow", [sequence], dataset="wall", root=Path("."), metadata={})
    return Manifests([root / "wall.arrow"])


def check_wall(view) -> None:
    """Known depth is on the wall; the colour of a pixel says where on the wall it is."""
    points = transform(rigid_inverse(view.camera.camera_from_world), unproject(view.depth, view.camera.K))
    known = view.depth > 0
    assert known.mean() > 0.5
    assert np.allclose(points[known][:, 2], 4.0, atol=0.02)
    place = np.clip(points[known][:, :2] / 6 + 0.5, 0, 1)
    assert np.abs(view.image[known][:, :2] / 255 - place).max() < 0.02


@pytest.mark.parametrize(("kind", "scale"), [("z", 2), ("ray", 1), ("ray", 3)])
def test_a_frame_has_everything_at_the_size_of_its_image(tmp_path, kind, scale):
    frame = manifest_frame(write(tmp_path, kind, scale), 1)
    view = frame.view()
    assert view.size == view.camera.size == view.depth.shape[::-1] == view.mask.shape[::-1] == SHOTS[1].size
    assert view.depth.dtype == np.float32
    assert np.array_equal(view.image, np.asarray(SHOTS[1].image()))
    assert np.allclose(view.camera.K, SHOTS[1].K)
    assert view.mask.mean() == 0.5
    assert view.mask[:, 0].all()
    check_wall(view)
    assert frame.read_depth().shape == (48 * scale, 64 * scale)


def test_augmentations_move_everything(tmp_path):
    frame = manifest_frame(write(tmp_path, "ray"), 1)
    view = frame.view(lambda whole: flip(crop_resize(whole, (-4, 6, 40, 46), (66, 60))))
    assert view.size == view.camera.size == view.depth.shape[::-1] == view.mask.shape[::-1] == (66, 60)
    assert not view.depth[:, -6:].any()  # outside of the image, then mirrored
    assert view.mask[:, 20:60].all()
    check_wall(crop_resize(view, (1, 1, 54, 59)))  # filters ring at the edge of the image


def test_absent_parts_are_none(tmp_path):
    frame = manifest_frame(write(tmp_path, poses=None, masks=None), 0)
    view = frame.view()
    assert view.mask is None
    assert np.isnan(view.camera.camera_from_world).all()
    frame = manifest_frame(write(tmp_path, intrinsics=None, depths=None, depth_format=None), 0)
    assert frame.view().camera is None
    assert frame.read_depth() is None
    with pytest.raises(DataError, match=r"depth_0\.png.* ray"):
        manifest_frame(write(tmp_path, "ray", intrinsics=None), 0).view()


def test_files_that_cannot_be_read_are_named(tmp_path):
    frame = manifest_frame(write(tmp_path), 1)
    for name in ("mask_1.png", "depth_1.png", "1.png"):  # the image is read first
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(DataError, match=name):
            frame.view()
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=name):
            frame.view()


def test_images_of_too_many_pixels_are_named(tmp_path, monkeypatch):
    frame = manifest_frame(write(tmp_path), 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"1\.png"):
        frame.view()


def test_images_are_upright(tmp_path):
    file = tmp_path / "sideways.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(file, exif=exif)
    assert read_rgb(file).size == image_size(file) == (20, 30)
    assert Frame("", file).view().image.shape == (30, 20, 3)
