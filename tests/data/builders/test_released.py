"""The builder of the authors' released annotation files, on miniatures of their forms."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from fastmum.data.errors import DataError


def write(raw, name, content):
    (raw / "annotations" / name).parent.mkdir(parents=True, exist_ok=True)
    (raw / "annotations" / name).write_bytes(gzip.compress(json.dumps(content, indent=4).encode()))


def entries(*paths, **more):
    return [{"filepath": path, "id": i, **more} for i, path in enumerate(paths)]


def test_sequences_are_those_of_the_files(add, found, raw):
    chain = [f"Undistorted_SfM/0001/images/{i}.jpg" for i in (3, 1, 2)]
    files = [f"12/{i}.jpg" for i in range(30)]
    add(*chain, *(f"dataset_aligned/{file}" for file in files))
    write(raw, "megadepth/train.jgz", {"0001": [entries(*chain), entries(*chain[:1]), entries(*chain[::-1])], "2": []})
    write(raw, "megadepth/val.jgz", {"0002": [entries("missing.jpg")]})
    write(raw, "3DStreetView/train.jgz", {"12": entries(*files), "short": entries(*files[:23])})
    annotations = raw / "annotations"
    made = found("released", annotations=str(annotations / "megadepth"), min_frames=2)
    assert made.sequences == {"0001_0": chain, "0001_2": chain[::-1]}
    assert made.manifest.scene_names(np.arange(2)) == ["0001", "0001"]
    street = found("released", annotations=str(annotations / "3DStreetView/train.jgz"))
    assert street.sequences == {"12": [f"dataset_aligned/{file}" for file in files]}
    with pytest.raises(DataError, match=r"^[^\n]*missing\.jpg[^\n]*--root"):
        found("released", annotations=str(annotations / "megadepth"), min_frames=1, split="val")


def test_cameras(add, found, raw):
    add("images/1.jpg", "images/2.jpg", "apple/1.jpg", "apple/2.jpg")
    half = 0.5**0.5
    cameras = {"qvec": [half, 0, half, 0], "tvec": [1, 2, 3]}
    extri, intri = [[0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3]], [[500, 0, 240], [0, 510, 240], [0, 0, 1]]
    write(raw, "co3d/apple_train.jgz", {"1_2_3": entries("apple/1.jpg", "apple/2.jpg", extri=extri, intri=intri)})
    write(raw, "MegaScenes/train.jgz", {"001": entries("images/1.jpg", "images/2.jpg", **cameras)})
    made = found("released", min_frames=2)
    assert [*made.sequences] == ["001", "apple/1_2_3"]
    for name in made.sequences:
        assert np.allclose(made.poses(name)[1], [*extri, [0, 0, 0, 1]], atol=1e-6)
    assert made.intrinsics("001") == [None, None]
    assert made.intrinsics("apple/1_2_3")[0].tolist() == [500, 510, 240, 240]


def test_damaged_files_are_one_line(add, found, raw):
    add("1.jpg")
    whole = gzip.compress(json.dumps({"a": entries("1.jpg")}).encode())
    damaged = whole[:10] + b"\xff" + whole[11:]
    for content in (whole[:-12], damaged, b"no gzip", gzip.compress(b'{"a": [{]}'), gzip.compress(b'{"a": [1]}'), b""):
        write(raw, "train.jgz", {})
        (raw / "annotations/train.jgz").write_bytes(content)
        with pytest.raises(DataError, match=r"^[^\n]*train\.jgz' cannot be read as released annotations[^\n]*$"):
            found("released", min_frames=1)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux")
def test_a_large_file_is_streamed(raw, tmp_path):
    """Decoded as a whole it would take ten times as much memory."""
    (raw / "annotations").mkdir()
    sequence = ", ".join(json.dumps(e, indent=4) for e in entries(*(f"Undistorted_SfM/0/{i}.jpg" for i in range(256))))
    with gzip.open(raw / "annotations/train.jgz", "wt", compresslevel=1) as file:
        file.write('{"0": [' + ", ".join([f"[{sequence}]"] * 2000) + "]}")  # 512,000 frames
    code = (
        "import gzip, resource, sys; from fastmum.data.builders.released import read_sequences\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(sum(len(frames) for _, _, frames in read_sequences(gzip.open(sys.argv[1], 'rt'))),"
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, raw / "annotations/train.jgz"]
    frames, kilobytes = map(int, subprocess.check_output(command, text=True).split())
    assert frames == 512_000
    assert kilobytes < 30_000
