"""Videos: which frames are taken, their rotation, and that finished videos are not decoded again."""

import struct
from fractions import Fraction

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
    """Writes a video of 64 x 32 at 10 frames a second; frame i is grey 8 i on the right and white on the left.

    `times` are those of the frames in ms; `aspect` is that of pixels; `cover` adds a picture as the first stream, which
    is marked as a cover if it is True, and large if it is "still".
    """

    def write(name, frames, times=None, aspect=None, cover=False, codec="mpeg4", options=None):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(raw / name), "w", options=options or {}) as container:
            if cover:
                side = 16 if cover is True else 640
                still = container.add_stream("mjpeg", rate=1, width=side, height=side, pix_fmt="yuvj420p")
                if cover is True:
                    still.disposition = av.stream.Disposition.attached_pic.value
                picture = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")
            rate = 1000 if times else 10
            stream = container.add_stream(codec, rate, width=64, height=32, pix_fmt="yuv420p", bit_rate=4_000_000)
            if aspect:
                stream.codec_context.sample_aspect_ratio = aspect
            if cover:
                container.mux([*still.encode(picture.reformat(format="yuvj420p")), *still.encode()])
            for i in range(frames):
                pixels = np.full((32, 64, 3), min(8 * i, 255), np.uint8)
                pixels[:, :32] = 255
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if times:
                    frame.pts, frame.time_base = times[i], Fraction(1, 1000)
                container.mux(stream.encode(frame))
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


def test_variable_rates_and_recordings_that_were_joined(film, found):
    times = [0, 40, 80, 500, 540, 1000, 1010, 1020, 1030, 2500, 2600, 2700, 4000]
    film("a.mkv", len(times), times)
    taken = [int(file[-10:-4]) for file in found("video", fps=2.0).sequences["a.mkv/000"]]
    assert [times[i] for i in taken] == [0, 500, 1000, 2500, 4000]
    film("a.mkv", 31, [round(i * 1000 / 30) for i in range(31)])
    assert found("video", fps=30.0).lengths == {"a.mkv/000": 31}, "stamps are rounded to milliseconds"
    part = film("b.ts", 20, codec="mpeg2video").read_bytes()
    (part_file := film("b.ts", 20, codec="mpeg2video")).write_bytes(2 * part)
    assert found("video", fps=5.0).lengths["b.ts/000"] == 20, part_file


@pytest.mark.parametrize(("aspect", "size"), [((2, 1), (128, 32)), ((1, 2), (64, 64)), ((1, 1000), (64, 32))])
def test_pixels_become_square(film, found, aspect, size):
    film("a.mkv", 4, aspect=Fraction(*aspect))
    assert pixels(found("video", every=1).manifest.file(0)).shape == (*size[::-1], 3)


def test_covers_sound_and_cut_videos(film, found, add, raw, caplog):
    for cover in (True, "still"):
        film("a.mp4", 10, cover=cover)
        assert found("video", every=1).lengths == {"a.mp4/000": 10}, cover
    (raw / "a.mp4").unlink()

    def sound():
        with av.open(str(raw / "b.mp4"), "w", format="wav") as container:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            samples.sample_rate = 8000
            container.mux(container.add_stream("pcm_s16le", 8000, layout="mono").encode(samples))

    for write in (sound, lambda: film("b.mp4", 0, cover=True), lambda: add("b.mp4")):
        write()
        with pytest.raises(DataError, match=r"^[^\n]*b\.mp4'[^\n]*$"):
            found("video", every=1)
    (raw / "b.mp4").unlink()
    file = film("cut.mp4", 60, options={"movflags": "faststart"})
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    assert 10 < found("video", every=1).lengths["cut.mp4/000"] < 54
    assert "cut.mp4' is cut off" in caplog.text


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
