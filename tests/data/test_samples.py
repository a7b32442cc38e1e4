"""Frames of manifests: image, depth, mask and camera read together, and every stored format of depth."""

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from plane_world import Shot, shot

from fastmum.data import staging, store
from fastmum.data.depth import READERS, SIDES, DepthFormat, read_depth, read_mask
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests, SequenceRecord, write_manifest
from fastmum.data.samples import Frame, image_size, manifest_frame, read_rgb
from fastmum.data.scene_loader import SceneLoader
from fastmum.geometry.camera import pixel_rays, rigid_inverse, transform, unproject
from fastmum.geometry.crop import crop_resize, flip

SHOTS = [shot(), shot((0.3, 0.1, 0.2), (0.1, -0.1, 0.2))]
VALUES = np.array([[0.0, 0.5, 3.0], [2.0, np.inf, -1.0]], np.float32)


def written_frame(root, row=1, kind="z", scale=1, **options):
    """Of two shots of the wall: depth in millimetres at `scale` times the resolution, masks of the left half."""
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
    return manifest_frame(Manifests([root / "wall.arrow"]), row)


def check_wall(view):
    """Known depth is on the wall; the colour of a pixel says where on the wall it is."""
    points = transform(rigid_inverse(view.camera.camera_from_world), unproject(view.depth, view.camera.K))
    known = view.depth > 0
    assert known.mean() > 0.5
    assert np.allclose(points[known][:, 2], 4.0, atol=0.02)
    place = np.clip(points[known][:, :2] / 6 + 0.5, 0, 1)
    assert np.abs(view.image[known][:, :2] / 255 - place).max() < 0.02


@pytest.mark.parametrize(("kind", "scale"), [("z", 2), ("ray", 1), ("ray", 3)])
def test_a_frame_has_everything_at_the_size_of_its_image_and_augmentations_move_it(tmp_path, kind, scale):
    frame = written_frame(tmp_path, 1, kind, scale)
    view = frame.view()
    assert view.size == view.camera.size == view.depth.shape[::-1] == view.mask.shape[::-1] == SHOTS[1].size
    assert view.depth.dtype == np.float32
    assert np.array_equal(view.image, np.asarray(SHOTS[1].image()))
    assert np.allclose(view.camera.K, SHOTS[1].K)
    assert view.mask.mean() == 0.5
    assert view.mask[:, 0].all()
    check_wall(view)
    assert frame.read_depth().shape == (48 * scale, 64 * scale)

    view = frame.view(lambda whole: flip(crop_resize(whole, (-4, 6, 40, 46), (66, 60))))
    assert view.size == view.camera.size == view.depth.shape[::-1] == view.mask.shape[::-1] == (66, 60)
    assert not view.depth[:, -6:].any()  # outside of the image, then mirrored
    assert view.mask[:, 20:60].all()
    check_wall(crop_resize(view, (1, 1, 54, 59)))  # filters ring at the edge of the image


def test_absent_parts_are_none(tmp_path):
    view = written_frame(tmp_path, poses=None, masks=None).view()
    assert view.mask is None
    assert np.isnan(view.camera.camera_from_world).all()
    frame = written_frame(tmp_path, intrinsics=None, depths=None, depth_format=None)
    assert frame.view().camera is frame.read_depth() is None
    with pytest.raises(DataError, match=r"depth_0\.png.* ray"):
        written_frame(tmp_path, 0, "ray", intrinsics=None).view()


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    frame = written_frame(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(DataError, match=r"/1\.png"):
            frame.view()
    for name in ("mask_1.png", "depth_1.png", "/1.png"):  # the image is read first
        for content in (b"nothing", None):
            file = tmp_path / name.strip("/")
            file.write_bytes(content) if content else file.unlink()
            with pytest.raises(DataError, match=name):
                frame.view()


def test_images_are_upright(tmp_path):
    file = tmp_path / "sideways.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(file, exif=exif)
    assert read_rgb(file).size == image_size(file) == (20, 30)
    assert Frame("", file).view().image.shape == (30, 20, 3)


COUNTS = ("png16", "sunrgbd")  # readers of whole numbers


def write(folder, reader):
    file = folder / f"depth.{reader}"
    if reader == "npy":
        np.save(file, VALUES)
    elif reader == "npz":
        with open(file, "wb") as stream:
            np.savez(stream, depth=VALUES, other=1)
    elif reader == "exr":
        exr = pytest.importorskip("OpenEXR", reason="OpenEXR is not installed: pip install 'fastmum[exr]'")
        exr.File({"type": exr.scanlineimage}, {"RGB": np.stack([VALUES] * 3, -1)}).write(str(file))
    elif reader == "hdf5":
        with pytest.importorskip("h5py").File(file, "w") as archive:
            archive["anything"] = VALUES
    elif reader in ("co3d", *COUNTS):
        file = folder / "depths/frame000001.jpg.geometric.png"
        file.parent.mkdir()
        counts, halves = np.array([[0, 5, 30], [20, 65535, 0]], np.uint16), VALUES.astype(np.float16).view(np.uint16)
        pixels = {"png16": counts, "sunrgbd": (counts << 3) | (counts >> 13), "co3d": halves}[reader]
        Image.fromarray(pixels).save(file)
    elif reader == "eth3d":
        file, image = (folder / name / "custom_undistorted/a.JPG" for name in ("ground_truth_depth", "images"))
        for path in (file, image):
            path.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((*VALUES.shape, 3), np.uint8)).save(image)
        VALUES.astype("<f4").tofile(file)
    else:
        header, rows = {"pfm": (b"Pf\n3 2\n-1.0\n", VALUES[::-1]), "colmap": (b"3&2&1&", VALUES)}[reader]
        file.write_bytes(header + rows.astype("<f4").tobytes())
    return file


@pytest.mark.parametrize("reader", READERS)
def test_depth_is_in_metres_and_0_where_unknown(tmp_path, reader):
    file, unit = write(tmp_path, reader), 0.2 if reader in COUNTS else 2.0
    depth = read_depth(file, DepthFormat(reader, unit, unknown=65535))
    assert depth.dtype == np.float32
    assert np.allclose(depth, [[0, 1, 6], [4, 0, 0]])
    assert np.allclose(read_depth(file, DepthFormat(reader, unit, unknown=65535, max=4)), [[0, 1, 0], [4, 0, 0]])


def test_variants_of_maps_and_masks(tmp_path):
    """Big-endian PFM; depth of CO3D, unknown outside its mask; masks, split at half."""
    (tmp_path / "d.pfm").write_bytes(b"Pf\n3 2\n1\n" + VALUES[::-1].astype(">f4").tobytes())
    assert read_depth(tmp_path / "d.pfm", DepthFormat("pfm")).tolist() == [[0, 0.5, 3], [2, 0, 0]]
    (tmp_path / "depth_masks").mkdir()
    Image.fromarray(np.array([[1, 1, 0], [1, 1, 1]], np.uint8)).save(tmp_path / "depth_masks/frame000001.png")
    assert read_depth(write(tmp_path, "co3d"), DepthFormat("co3d")).tolist() == [[0, 0.5, 0], [2, 0, 0]]
    Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("reader", SIDES)
def test_what_maps_need_is_found_in_stages_and_stores_and_read_ahead(tmp_path, reader, monkeypatch, no_stage):
    (root := tmp_path / "raw").mkdir()
    depth = write(root, reader).relative_to(root).as_posix()
    (root / "depth_masks").mkdir()
    Image.fromarray(np.array([[1, 1, 0], [1, 1, 1]], np.uint8)).save(mask := root / "depth_masks/frame000001.png")
    record = SequenceRecord("s", [depth], depths=[depth], depth_format=DepthFormat(reader))
    write_manifest(tmp_path / "m.arrow", [record], dataset="d", root=root, metadata={})
    memory, fetched, fetch = pytest.importorskip("fsspec").filesystem("memory"), [], store.fetch
    monkeypatch.setattr(store, "fetch", lambda place: fetched.append(threading.current_thread().name) or fetch(place))

    def read(roots=None):
        loader = SceneLoader(Manifests([tmp_path / "m.arrow"], roots), 1)
        files = loader.files_of_plan(SimpleNamespace(rows=np.array([0])))
        for file in files if store.stage else ():
            staging._stage.copy(file.place)
            fetched.clear()
        with staging.reading_ahead(files):
            return manifest_frame(loader.manifests, 0).read_depth().tolist()

    masked = reader == "co3d"
    for known in (0 if masked else 3, 3):  # of the pixel that the mask leaves out
        assert (right := read()) == [[0, 0.5, known], [2, 0, 0]]
        memory.put(f"{root}/", f"/{reader}{masked}", recursive=True)
        fetched.clear()
        assert read({"d": f"memory://{reader}{masked}"}) == right
        assert [name[:5] for name in fetched] == ["read_"] * 2
        staging.start(str(tmp_path / "scratch"), 1)
        assert read() == right
        assert len(fetched) == (reader == "co3d" and not masked)
        staging.start(None, 0)
        mask.unlink(missing_ok=True)
        masked = False


def test_broken_maps_are_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken").write_bytes(b"Pf\n3 2\nx\n")
    Image.new("RGB", (3, 2)).save(tmp_path / "coloured", "png")
    for reader in READERS:
        for name in ("broken", "absent"):
            with pytest.raises(DataError, match=rf"^[^\n]*{name}[^\n]*$"):
                read_depth(tmp_path / name, DepthFormat(reader))
    with open(tmp_path / "huge.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 20)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DataError, match=r"huge.*size"):
        read_depth(tmp_path / "huge.npy", DepthFormat("npy"))
    with pytest.raises(DataError, match=r"coloured.*\(2, 3, 3\), have 8 bits"):
        read_depth(tmp_path / "coloured", DepthFormat("png16"))
    whole = write(tmp_path, "npz").read_bytes()
    values, listed = whole.index(VALUES.tobytes()), whole.index(b"PK\1\2")
    for place, reason in ((values, "CRC"), (listed + 8, "encrypted"), (listed + 10, "compression")):
        (tmp_path / "broken.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=rf"^[^\n]*broken\.npz[^\n]*{reason}[^\n]*$"):
            read_depth(tmp_path / "broken.npz", DepthFormat("npz"))
    for reader, package, extra in (("hdf5", "h5py", "evaluate"), ("exr", "OpenEXR", "exr")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(DataError, match=rf"broken.*fastmum\[{extra}\]"):
            read_depth(tmp_path / "broken", DepthFormat(reader))
