"""Videos: which frames are taken, their rotation, and that finished videos are not decoded again."""

import struct

import numpy as np
import pytest
from PIL import Image

from fastmum.data.build import build
from fastmum.data.errors import DataError

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'fastmum[video]'")


@pytest.fixture
def film(raw):
    """Writes a video at 10 frames a second; frame i is grey 8 i on the right and white on the left."""

    def write(name, frames, size=(64, 32)):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(raw / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height = size
            stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
            for i in range(frames):
                pixels = np.full((size[1], size[0], 3), 8 * i, np.uint8)
                pixels[:, : size[0] // 2] = 255
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return raw / name

    return write


def test_frames_by_rate_and_by_number(film, found, add, tmp_path):
    for name, frames in (("day/10.mp4", 25), ("day/9.MOV", 3)):
        film(name, frames)
    add("notes.txt", ".hidden.mp4")
    walk, name = found("video", fps=5.0), "day/10.mp4/000"
    assert list(walk.sequences) == ["day/9.MOV/000", name]
    assert walk.sequences[name] == [f"day/10.mp4/{i:06d}.jpg" for i in range(0, 25, 2)]
    assert walk.root == tmp_path / "video_frames"
    greys = []
    for row in walk.rows[name]:
        with Image.open(walk.manifest.file(row)) as image:
            greys.append(float(np.asarray(image)[:, 40:].mean()))
    assert np.allclose(greys, np.arange(0, 25, 2) * 8, atol=4)
    third = found("video", every=3, chunk=4)
    assert third.sequences["day/10.mp4/000"] == [f"day/10.mp4/{i:06d}.jpg" for i in (0, 3, 6, 9)]
    assert third.lengths == {"day/10.mp4/000": 4, "day/10.mp4/001": 4}, "rests of one frame are skipped"
    assert found("video", every=3, chunk=4, rule="released").lengths == {"day/10.mp4/000": 4, "day/10.mp4/001": 5}


def test_finished_videos_are_kept_and_changed_ones_are_not(film, found, tmp_path):
    film("a.mp4", 10), film("b.mp4", 10)
    found("video", every=2)
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
    with Image.open(turned.manifest.file(2)) as image:
        assert image.size == (16, 32)
        assert np.asarray(image)[2:12].mean() > 240
        assert np.asarray(image)[20:30].mean() < 40


def test_an_interrupted_video_leaves_no_folder(film, raw, tmp_path, monkeypatch):
    film("a.mp4", 10), film("b.mp4", 10)
    save, saved = Image.Image.save, []

    def stop(self, file, **options):
        saved.append(file)
        if len(saved) > 7:
            raise KeyboardInterrupt
        save(self, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            build("video", raw, tmp_path / "v.arrow", every=2)
    assert not (tmp_path / "v.arrow").exists()
    assert [folder.name for folder in (tmp_path / "v_frames").iterdir()] == ["a.mp4"]
    assert build("video", raw, tmp_path / "v.arrow", every=2).counts == (2, 10)


def test_unreadable_videos_are_named_or_skipped(film, add, found):
    film("a.mp4", 10)
    add("b.mp4", content="not a video")
    with pytest.raises(DataError, match=r"b\.mp4' cannot be decoded") as caught:
        found("video", every=1)
    assert "\n" not in str(caught.value)
    assert found("video", every=1, broken="skip").lengths == {"a.mp4/000": 10}
    with pytest.raises(DataError, match="--every and --fps"):
        found("video", every=1, fps=2.0)
