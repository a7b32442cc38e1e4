"""Only regular files are opened: a named pipe would hold a command up for ever."""

import os
import signal
import socket

import numpy as np
import pytest

from fastmum.data.builders.cameras import upright
from fastmum.data.builders.video import _frames
from fastmum.data.colmap import read_model
from fastmum.data.decode import FrameError
from fastmum.data.decode.image import read_header
from fastmum.data.depth import READERS, DepthFormat, read_depth, read_mask
from fastmum.data.inspect import _thumbnail
from fastmum.data.manifest import Manifest
from fastmum.data.samples import image_size, read_rgb
from fastmum.engine.checkpoint import load_checkpoint
from fastmum.errors import FastmumError
from fastmum.evaluate.pairs.pair import read_archive, read_json, read_table
from fastmum.evaluate.records import read
from fastmum.features.store import read_features
from fastmum.files import regular
from fastmum.pretrained.files import read_saved

# File in a folder: what reads it.
OPENED = {
    **{f"depth.{name}": lambda file, name=name: read_depth(file, DepthFormat(name)) for name in READERS},
    "frame.jpg": read_header, "mask.png": read_mask, "image.png": read_rgb, "sized.png": image_size,
    "a.arrow": Manifest, "weights.pth": read_saved, "model.safetensors": read_saved,
    "config.json": lambda file: read_saved(file.parent),
    "manifest.json": lambda file: load_checkpoint(file.parent, {}, {}),
    "images.bin": lambda file: read_model(file.parent),
    "features.npz": read_features, "features.safetensors": read_features,
    "scene.npy": read_archive, "pose.txt": lambda file: read_table(file, (3, 3)), "pairs.json": read_json,
    "result.json": lambda file: read(file.parent),
    "video.mp4": lambda file: list(_frames(file, {})),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_hang():
    """A test that hangs is ended by SIGALRM."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("name", OPENED)
def test_a_named_pipe_is_refused_in_one_line(name, tmp_path):
    if name == "video.mp4":
        pytest.importorskip("av", reason="PyAV is not installed: pip install 'fastmum[video]'")
    if name == "depth.hdf5":
        pytest.importorskip("h5py", reason="h5py is not installed: pip install 'fastmum[evaluate]'")
    os.mkfifo(tmp_path / name)
    with pytest.raises((FastmumError, FrameError), match=rf"^[^\n]*({name}|{tmp_path}|regular)[^\n]*$"):
        OPENED[name](tmp_path / name)


def test_pipes_sockets_and_devices_are_no_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for name in ("pipe", "zero", "socket"):
        with pytest.raises(OSError, match="not a regular file") as caught:
            regular(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert regular(tmp_path / "link") == tmp_path / "link"
    # Callers that continue without the file.
    assert not upright(tmp_path / "pipe", np.eye(4), np.ones(4))[2]
    assert _thumbnail(tmp_path / "pipe", 8).size == (8, 8)
