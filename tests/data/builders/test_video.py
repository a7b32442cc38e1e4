"""Videos: which frames are taken, their rotation, and that finished videos are not decoded again."""

import struct

import numpy as np
import pytest
from PIL import Image

from fastmum.data.errors import DataError

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'fastmum[video]'")


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image)


@pytest.fixture
def film(raw):
    """Writes a video of 64 x 32 at 10 frames a second; frame i is grey 8 i on the right and white on the left."""

    def write(name, frames):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(raw / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=10, width=64, height=32, pix_fmt="yuv420p", bit_rate=4_000_000)
            for i in range(frames):
                pixels = np.full((32, 64, 3), 8 * i, np.uint8)
                pixels[:, :32] = 255
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return raw / name

    return write


def test_frames_by_rate_and_by_number(film, found, add, tmp_path):
    film("day/10.mp4", 25), film("day/9.MOV", 3)
    add("notes.txt", ".hidden.mp4")
    walk, name = found("video", fps=5.0), "day/10.mp4/000"
    assert list(walk.sequences) == ["day/9.MOV/000", name]
    assert walk.sequences[name] == [f"day/10.mp4/{i:06d}.jpg" for i in range(0, 25, 2)]
    assert walk.manifest.root == tmp_path / "video_frames"
    greys = [pixels(walk.manifest.file(row))[:, 40:].mean() for row in walk.rows[name]]
    assert np.allclose(greys, np.arange(0, 25, 2) * 8, atol=4)
    third = found("video", every=3, chunk=4)
    assert third.sequences["day/10.mp4/000"] == [f"day/10.mp4/{i:06d}.jpg" for i in (0, 3, 6, 9)]
    assert third.lengths == {"day/10.mp4/000": 4, "day/10.mp4/001": 4}, "rests of one frame are skipped"
    assert found("video", every=3, chunk=4, rule="released").lengths == {"day/10.mp4/000": 4, "day/10.mp4/001": 5}


def test_finished_videos_are_kept_and_interrupted_or_changed_ones_are_not(film, found, tmp_path, monkeypatch):
    film("a.mp4", 10), film("b.mp4", 10)
    save, left = Image.Image.save, list(range(7))

    def stop(self, file, **options):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        save(self, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            found("video", every=2)
    assert not (tmp_path / "video.arrow").exists()
    assert [folder.name for folder in (tmp_path / "video_frames").iterdir()] == ["a.mp4"]
    assert list(found("video", every=2).lengths.values()) == [5, 5]
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "video_frames").rglob("*.jpg")}
    film("b.mp4", 6)
    assert list(found("video", every=2).lengths.values()) == [5, 3]
    kept = {file for file, time in written.items() if file.exists() and file.stat().st_mtime_ns == time}
    assert kept == {file for file in written if file.parent.name == "a.mp4"}
    assert list(found("video", every=5).lengths.values()) == [2, 2]


def test_upright_and_shrunk(film, found):
    """The track's matrix is set to a quarter turn clockwise: the white left half is then on top."""
    file = film("a.mp4", 3)
    content = bytearray(file.read_bytes())
    matrix = content.find(b"tkhd") + 4 + 40  # after the box's type: version, times, ids, layer, volume
    assert struct.unpack(">9i", content[matrix : matrix + 36])[0] == 1 << 16
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    file.write_bytes(content)
    turned = found("video", every=1, short_side=16)
    image = pixels(turned.manifest.file(2))
    assert image.shape == (32, 16, 3)
    assert image[2:12].mean() > 240
    assert image[20:30].mean() < 40


def test_unreadable_videos_are_named_or_skipped(film, add, found):
    film("a.mp4", 10)
    add("b.mp4", content="not a video")
    with pytest.raises(DataError, match=r"^[^\n]*b\.mp4' cannot be decoded[^\n]*$"):
        found("video", every=1)
    assert found("video", every=1, broken="skip").lengths == {"a.mp4/000": 10}
    with pytest.raises(DataError, match="--every and --fps"):
        found("video", every=1, fps=2.0)
