"""Depth maps and masks in every stored format, against values written by hand."""

import sys

import numpy as np
import pytest
from PIL import Image

from fastmum.data.depth import READERS, DepthFormat, read_depth, read_mask
from fastmum.data.errors import DataError

VALUES = np.array([[0.0, 0.5, 3.0], [2.0, np.inf, -1.0]], np.float32)


def write(folder, reader):
    file = folder / f"depth.{reader}"
    if reader == "npy":
        np.save(file, VALUES)
    elif reader == "hdf5":
        with pytest.importorskip("h5py").File(file, "w") as archive:
            archive["anything"] = VALUES
    elif reader == "co3d":
        file = folder / "depths/frame000001.jpg.geometric.png"
        file.parent.mkdir()
        Image.fromarray(VALUES.astype(np.float16).view(np.uint16)).save(file)
    elif reader == "png16":
        Image.fromarray(np.array([[0, 5, 30], [20, 65535, 0]], np.uint16)).save(file, "png")
    else:
        header, values = {"pfm": (b"Pf\n3 2\n-1.0\n", VALUES[::-1]), "colmap": (b"3&2&1&", VALUES)}[reader]
        file.write_bytes(header + values.astype("<f4").tobytes())
    return file


@pytest.mark.parametrize("reader", READERS)
def test_depth_is_in_metres_and_0_where_unknown(tmp_path, reader):
    file, unit = write(tmp_path, reader), 0.2 if reader == "png16" else 2.0
    depth = read_depth(file, DepthFormat(reader, unit, unknown=65535))
    assert depth.dtype == np.float32
    assert np.allclose(depth, [[0, 1, 6], [4, 0, 0]])
    assert np.allclose(read_depth(file, DepthFormat(reader, unit, unknown=65535, max=4)), [[0, 1, 0], [4, 0, 0]])


def test_big_endian_maps_are_read(tmp_path):
    (tmp_path / "d.pfm").write_bytes(b"Pf\n3 2\n1\n" + VALUES[::-1].astype(">f4").tobytes())
    assert read_depth(tmp_path / "d.pfm", DepthFormat("pfm")).tolist() == [[0, 0.5, 3], [2, 0, 0]]


def test_depth_of_co3d_is_unknown_outside_its_mask(tmp_path):
    file = write(tmp_path, "co3d")
    (tmp_path / "depth_masks").mkdir()
    Image.fromarray(np.array([[1, 1, 0], [1, 1, 1]], np.uint8)).save(tmp_path / "depth_masks/frame000001.png")
    assert read_depth(file, DepthFormat("co3d")).tolist() == [[0, 0.5, 0], [2, 0, 0]]


def test_masks_are_split_at_half(tmp_path):
    Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == [[False, False, True, True]]


def test_broken_maps_are_named_in_one_line(tmp_path):
    (tmp_path / "broken").write_bytes(b"Pf\n3 2\nx\n")
    for reader in READERS:
        for name in ("broken", "absent"):
            with pytest.raises(DataError, match=name) as caught:
                read_depth(tmp_path / name, DepthFormat(reader))
            assert "\n" not in str(caught.value)
    Image.new("RGB", (3, 2)).save(tmp_path / "d.png")
    with pytest.raises(DataError, match=r"\(2, 3, 3\)"):
        read_depth(tmp_path / "d.png", DepthFormat("png16"))


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"fastmum\[evaluate\]"):
        read_depth(tmp_path / "d.h5", DepthFormat("hdf5"))
