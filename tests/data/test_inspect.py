"""What `python -m fastmum.data.inspect` prints, finds missing and draws."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastmum.data.build import build
from fastmum.data.depth import DepthFormat
from fastmum.data.inspect import COLUMNS, MISSING, UNKNOWN, contact_sheet, find_missing, main, summary
from fastmum.data.manifest import Manifest, SequenceRecord, write_manifest


@pytest.fixture
def rooms(image_folder, tmp_path):
    """Four sequences of six images."""
    build("folder", image_folder, tmp_path / "rooms.arrow")
    return tmp_path / "rooms.arrow"


def written(out, *records, root="/data", **metadata):
    write_manifest(out, records, dataset="rooms", root=root, metadata=metadata)
    return Manifest(out)


def test_the_summary(tmp_path):
    records = [SequenceRecord(f"s{n}", [f"s{n}/{j}.jpg" for j in range(n)]) for n in (1, 3, 24, 30, 49, 1500)]
    pose = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
    pose[1] = np.nan
    records[1] = records[1]._replace(poses=pose, masks=["", "m.png", ""])
    lines = list(summary(written(tmp_path / "m", *records, builder="x", rule="paper", options={"chunk": 9})))
    text = "\n".join(lines)
    assert "6 sequences, 1607 frames" in lines[0]
    for line in ("root: /data", "builder: x, rule: paper", "options: chunk 9", "pose known: 2 frames (0.1%)",
                 "mask known: 1 frames (0.1%)", "depth known: 0 frames (0.0%)"):  # fmt: skip
        assert line in lines
    assert [line.split() for line in lines if line.startswith("rooms")] == [["rooms", "6", "1607", "1", "27", "1500"]]
    histogram = dict(line.split()[:2] for line in text[text.index("   frames  sequences") :].splitlines()[1:-1])
    assert histogram == {"1": "1", "2-3": "1", "4-7": "0", "8-15": "0", "16-23": "0", "24-49": "3", "50-99": "0",
                         "100-199": "0", "200-499": "0", "500-999": "0"}  # fmt: skip
    assert lines[-1].split()[:3] == ["1000", "on", "1"]


def test_every_file_is_looked_for_once(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("0", "1", "more"):
        (tmp_path / "a" / name).touch()
    records = [
        SequenceRecord("x", ["a/0", "a/1", "a/2"], depths=["a/1", "", "a/d"], depth_format=DepthFormat("npy")),
        SequenceRecord("y", ["a/2", "a/0"]),
        SequenceRecord("z", ["b/0"]),
    ]
    manifest = written(tmp_path / "m", *records, root=tmp_path)
    assert {folder.name: sorted(names) for folder, names in manifest.folders()} == {"a": ["0", "1", "2"], "b": ["0"]}
    total, missing = find_missing(manifest)
    assert (total, sorted(missing)) == (4, [tmp_path / "a/2", tmp_path / "b/0"])
    assert find_missing(manifest, "depth") == (2, [tmp_path / "a/d"])
    assert find_missing(manifest, "mask") == (0, [])


def test_missing_files_are_named_and_change_the_exit_code(rooms, image_folder, capsys):
    assert main([str(rooms), "--check"]) == 0
    assert "missing: 0 of 24 images" in capsys.readouterr().out
    for scene in range(2):
        for file in (image_folder / f"scene{scene}").iterdir():
            file.unlink()
    assert main([str(rooms), "--check"]) == 1
    out = capsys.readouterr().out
    assert "missing: 12 of 24 images" in out
    assert f"  {image_folder}/scene0/0.png" in out
    assert "  ..." in out


def test_the_sheet_shows_frames(rooms, image_folder):
    sheet = np.asarray(contact_sheet(Manifest(rooms), tile=32), dtype=float)
    assert sheet.shape[:2] == (4 * (16 + 34 + 2), COLUMNS * 34 - 2), "four sequences of at most six frames, a line each"
    assert np.array_equal(sheet, contact_sheet(Manifest(rooms), tile=32))
    assert not np.array_equal(sheet, np.asarray(contact_sheet(Manifest(rooms), tile=32, seed=1))[: len(sheet)])
    thumbnails = []
    for file in sorted((image_folder / "scene0").iterdir()):
        with Image.open(file) as image:
            thumbnails.append(np.asarray(image.crop((4, 0, 44, 40)).resize((32, 32)), dtype=float))
    first = sheet[16:48, :32]
    assert min(np.abs(first - thumbnail).mean() for thumbnail in thumbnails) < 4


def test_the_sheet_shows_depth_and_what_is_unreadable(tmp_path):
    depth = np.linspace(1, 9, 32 * 32, dtype=np.float32).reshape(32, 32)
    depth[:, :16] = 0
    np.save(tmp_path / "d.npy", depth)
    record = SequenceRecord("a", ["0.png"], depths=["d.npy"], depth_format=DepthFormat("npy"))
    sheet = np.asarray(contact_sheet(written(tmp_path / "m", record, root=tmp_path), tile=32))
    assert (sheet[16:48, :32] == MISSING).all()
    assert (sheet[50:82, :16] == UNKNOWN).all()
    shown = sheet[50:82, 16:32].astype(int)
    assert (shown[0] > 240).all(), "near is bright"
    assert (shown[-1] < 5).all()
    assert (np.diff(shown[:, 0, 0]) <= 0).all()


def test_where_the_sheet_is_written(rooms, tmp_path, capsys):
    assert main([str(rooms), "--no-sheet"]) == 0
    assert not (tmp_path / "rooms_sheet.jpg").exists()
    assert main([str(rooms)]) == 0
    assert (tmp_path / "rooms_sheet.jpg").stat().st_size > 0
    assert main([str(rooms), "--sheet", str(tmp_path / "s.jpg"), "--sequences", "2"]) == 0
    with Image.open(tmp_path / "s.jpg") as image:
        assert image.size == (12 * 98 - 2, 2 * (16 + 98 + 2))
    assert f"contact sheet: {tmp_path / 's.jpg'}" in capsys.readouterr().out


def test_a_reader_may_close_the_pipe(rooms):
    command = [sys.executable, "-m", "fastmum.data.inspect", str(rooms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # long before the interpreter has started
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_errors_are_one_line(rooms, capsys):
    for words, message in (
        (["nowhere.arrow"], "nowhere.arrow"),
        (["--sheet", "/proc/s.jpg"], "--sheet '/proc/s.jpg'"),
        (["--sheet", "s.doc"], "--sheet 's.doc'"),
        (["--sequences", "0"], "--sequences is 0"),
    ):
        assert main([*([] if words[0].startswith("nowhere") else [str(rooms)]), *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
