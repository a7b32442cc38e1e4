"""What `python -m fastmum.data.inspect` prints, finds missing and draws."""

import re
import subprocess
import sys

import numpy as np
import pytest

from fastmum.data.build import build
from fastmum.data.depth import DepthFormat
from fastmum.data.inspect import COLUMNS, MISSING, UNKNOWN, contact_sheet, find_missing, main, summary
from fastmum.data.manifest import Manifest, SequenceRecord, write_manifest
from fastmum.data.samples import image_size, read_rgb


@pytest.fixture
def rooms(image_folder, tmp_path):
    """Four sequences of six images."""
    build("folder", image_folder, tmp_path / "rooms.arrow")
    return tmp_path / "rooms.arrow"


def written(root, *records, **metadata):
    write_manifest(root / "m", records, dataset="rooms", root=root, metadata=metadata)
    return Manifest(root / "m")


def test_the_summary(tmp_path):
    records = [SequenceRecord(f"s{n}", [f"s{n}/{j}.jpg" for j in range(n)]) for n in (1, 3, 24, 30, 49, 1500)]
    pose = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
    pose[1] = np.nan
    records[1] = records[1]._replace(poses=pose, masks=["", "m.png", ""])
    lines = list(summary(written(tmp_path, *records, builder="x", rule="paper", options={"chunk": 9})))
    assert "6 sequences, 1607 frames" in lines[0]
    known = ["pose known: 2 frames (0.1%)", "mask known: 1 frames (0.1%)", "depth known: 0 frames (0.0%)"]
    assert {f"root: {tmp_path}", "builder: x, rule: paper", "options: chunk 9", *known} <= set(lines)
    assert [line.split() for line in lines if line.startswith("rooms")] == [["rooms", "6", "1607", "1", "27", "1500"]]
    bins = ["1 1", "2-3 1", "4-7 0", "8-15 0", "16-23 0", "24-49 3", "50-99 0", "100-199 0", "200-499 0", "500-999 0"]
    assert [" ".join(line.split()[:2]) for line in lines[-11:-1]] == bins
    assert lines[-1].split()[:3] == ["1000", "on", "1"]


def test_every_file_is_looked_for_once(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("0", "1", "more"):
        (tmp_path / "a" / name).touch()
    depths = {"depths": ["a/1", "", "a/d"], "depth_format": DepthFormat("npy")}
    first = SequenceRecord("x", ["a/0", "a/1", "a/2"], **depths)
    manifest = written(tmp_path, first, SequenceRecord("y", ["a/2", "a/0"]), SequenceRecord("z", ["b/0"]))
    assert {folder.name: sorted(names) for folder, names in manifest.folders()} == {"a": ["0", "1", "2"], "b": ["0"]}
    total, missing = find_missing(manifest)
    assert (total, sorted(missing)) == (4, [tmp_path / "a/2", tmp_path / "b/0"])
    assert find_missing(manifest, "depth") == (2, [tmp_path / "a/d"])
    assert find_missing(manifest, "mask") == (0, [])


def test_the_sheet_shows_frames(rooms, image_folder):
    sheet, same, other = (np.asarray(contact_sheet(Manifest(rooms), seed=s, tile=32), float) for s in (0, 0, 1))
    assert sheet.shape[:2] == (4 * (16 + 34 + 2), COLUMNS * 34 - 2), "four sequences of at most six frames, a line each"
    assert np.array_equal(sheet, same)
    assert not np.array_equal(sheet, other)
    images = [read_rgb(file) for file in (image_folder / "scene0").iterdir()]
    thumbnails = [np.asarray(image.crop((4, 0, 44, 40)).resize((32, 32)), float) for image in images]
    assert min(np.abs(sheet[16:48, :32] - thumbnail).mean() for thumbnail in thumbnails) < 4


def test_the_sheet_shows_depth_and_what_is_unreadable(tmp_path):
    depth = np.linspace(1, 9, 32 * 32, dtype=np.float32).reshape(32, 32)
    depth[:, :16] = 0
    np.save(tmp_path / "d.npy", depth)
    record = SequenceRecord("a", ["0.png"], depths=["d.npy"], depth_format=DepthFormat("npy"))
    sheet = np.asarray(contact_sheet(written(tmp_path, record), tile=32))
    assert (sheet[16:48, :32] == MISSING).all()
    assert (sheet[50:82, :16] == UNKNOWN).all()
    shown = sheet[50:82, 16:32].astype(int)
    assert (shown[0] > 240).all(), "near is bright"
    assert (shown[-1] < 5).all()
    assert (np.diff(shown[:, 0, 0]) <= 0).all()


def test_the_command(rooms, image_folder, tmp_path, capsys):
    """Where the sheet is written, missing files and the exit code, and errors in one line."""
    assert main([str(rooms), "--no-sheet", "--check"]) == 0
    assert "missing: 0 of 24 images" in capsys.readouterr().out
    assert not (tmp_path / "rooms_sheet.jpg").exists()
    assert main([str(rooms), "--sheet", str(tmp_path / "s.jpg"), "--sequences", "2"]) == 0
    assert image_size(tmp_path / "s.jpg") == (12 * 98 - 2, 2 * (16 + 98 + 2))
    assert f"contact sheet: {tmp_path / 's.jpg'}" in capsys.readouterr().out
    for scene in range(2):
        for file in (image_folder / f"scene{scene}").iterdir():
            file.unlink()
    assert main([str(rooms), "--check"]) == 1
    assert (tmp_path / "rooms_sheet.jpg").stat().st_size > 0
    out = capsys.readouterr().out
    for part in ("missing: 12 of 24 images", f"  {image_folder}/scene0/0.png", "  ..."):
        assert part in out
    for words, message in (
        (["nowhere.arrow"], "nowhere.arrow"),
        ([str(rooms), "--sheet", "/proc/s.jpg"], "--sheet '/proc/s.jpg'"),
        ([str(rooms), "--sheet", "s.doc"], "--sheet 's.doc'"),
        ([str(rooms), "--sequences", "0"], "--sequences"),
    ):
        assert main(words) == 2
        assert re.fullmatch(f"error: [^\n]*{message}[^\n]*\n", capsys.readouterr().err)


def test_a_reader_may_close_the_pipe(rooms):
    command = [sys.executable, "-m", "fastmum.data.inspect", str(rooms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # long before the interpreter has started
    assert process.stderr.read() == ""
    assert process.wait() == 0
