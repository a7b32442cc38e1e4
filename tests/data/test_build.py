"""The commands that build and show manifests: whole files, identical bytes, contact sheets, one line per error."""

import errno
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from fastmum.data.build import build, main
from fastmum.data.builders import BUILDERS
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.inspect import COLUMNS, MISSING, UNKNOWN, contact_sheet, find_missing, summary
from fastmum.data.inspect import main as inspect
from fastmum.data.manifest import Manifest, SequenceRecord, write_manifest
from fastmum.data.samples import image_size, read_rgb


def test_a_manifest_says_how_it_was_made(image_folder, tmp_path, capsys):
    out = tmp_path / "deep/er/m.arrow"
    (image_folder / "scene3/0.png").unlink()
    words = ["--out", str(out), "--seed", "3", "--min-frames", "6", "--dataset", "mine"]
    assert main(["folder", "--root", str(image_folder), *words]) == 0
    assert f"{out}: 3 sequences, 18 frames of 4 parts; 1 gave none" in capsys.readouterr().out
    assert Manifest(out).metadata == {
        "builder": "folder", "rule": "paper", "seed": 3, "options": {"min_frames": 6, "single": False},
        "source": str(image_folder), "root": str(image_folder), "counts": {"sequences": 3, "frames": 18},
    }  # fmt: skip
    assert Manifest(out).datasets == ("mine",)


def test_the_bytes_depend_neither_on_the_run_nor_on_the_workers(tmp_path):
    camera = "extrinsic\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\nintrinsic\n1 0 3\n0 2 4\n0 0 1\n"
    for scene in "abcdefghi":  # more than are read ahead
        for name in ("blended_images/0.jpg", "blended_images/1.jpg", "rendered_depth_maps/1.pfm", "cams/1_cam.txt"):
            file = tmp_path / "raw" / scene / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(camera)
    for name, workers in (("0", 0), ("1", 1), ("2", 2)):
        assert build("blendedmvs", tmp_path / "raw", tmp_path / name, workers=workers).counts == (9, 18)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert Manifest(tmp_path / "2").known == {"pose": 9, "intrinsics": 9, "depth": 9, "mask": 0}


def test_frames_below_the_manifest_move_with_it(image_folder, tmp_path):
    with pytest.raises(TypeError, match="folder has no option"):
        build("folder", image_folder, tmp_path / "m.arrow", chunk=3)
    build("folder", image_folder, tmp_path / "m.arrow")
    (tmp_path / "moved").mkdir()
    for name in ("images", "m.arrow"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    manifest = Manifest(tmp_path / "moved/m.arrow")
    assert manifest.metadata["root"] == "images"
    assert manifest.datasets == ("folder",)
    assert manifest.file(0).is_file()


def test_an_error_in_a_part_reaches_the_user_and_leaves_nothing(tmp_path):
    for scene in ("a", "b", "c"):
        (tmp_path / f"raw/{scene}/dslr/resized_undistorted_images").mkdir(parents=True)
        (tmp_path / f"raw/{scene}/dslr/train_test_lists.json").touch()
    with pytest.raises(DataError, match=r"a/dslr/train_test_lists\.json'"):
        build("scannetpp", tmp_path / "raw", tmp_path / "m.arrow", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_errors_of_the_build_are_one_line(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["--root", "~no-such-user"], "--root is '~no-such-user'"),
        (["--out", "images"], "--out is 'images'"),
        (["--out", "images/scene0/0.png/m"], "--out is 'images/scene0/0.png/m'"),
        (["--out", "/proc/m.arrow"], "/proc/m.arrow"),
        (["--seed", "-1"], "--seed is -1"),
        (["--min-frames", "9"], "--min-frames"),
    ):
        assert main(["folder", "--root", "images", "--out", "m.arrow", *words]) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert message in error.replace(f"{tmp_path}/", "")
        assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert main(["video", "--root", "images", "--out", "m", "--quality", "500"]) == 2
    assert "--quality is 500" in capsys.readouterr().err


def test_every_builder_is_documented_and_names_its_layout(request, tmp_path, capsys, monkeypatch):
    def text_of_help(*words):
        with pytest.raises(SystemExit, match="0"):
            main([*words, "--help"])
        return " ".join(capsys.readouterr().out.split())

    monkeypatch.setenv("COLUMNS", "1000")
    page, listed = (request.config.rootpath / "docs/data.md").read_text(), text_of_help()
    table = {line.split("|")[1].strip(" `"): line for line in page.splitlines()[::-1] if line.startswith("| `")}
    (tmp_path / "notes.txt").touch()
    for name, builder in BUILDERS.items():
        assert (builder.released is None) == ("| the same |" in table[name])
        assert f"{name} " in listed
        assert builder.layout in listed
        assert main([name, "--root", str(tmp_path), "--out", str(tmp_path / "m")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert builder.layout in error
        assert error.count("\n") == 1
    text = text_of_help("streetview3d")
    assert "--rule released: chunks of 24, the last one takes the rest" in text
    assert "--chunk" in text


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 0), (signal.SIGKILL, 2)])
def test_a_signal_leaves_the_older_file_and_no_worker(image_folder, tmp_path, number, workers):
    out = tmp_path / "m.arrow"
    out.write_text("older")
    script = (  # waits in the middle of writing
        "import signal, sys, time; from fastmum.data import build, manifest_writer as writer\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "add = writer._Spool.add\n"
        "writer._Spool.add = lambda *a: (add(*a), print('added', flush=True), time.sleep(60))\n"
        "sys.exit(build.main(sys.argv[1:]))"
    )
    words = "folder", "--root", image_folder, "--out", out, "--workers", str(workers)
    command = [sys.executable, "-c", script, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "added\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=50)  # workers hold the inherited pipe, which closes with the last of them
    assert out.read_text() == "older"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 128 + number, errors
    assert "nothing was written" in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "m.arrow"]


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


def test_the_sheet_shows_frames_depth_and_what_is_unreadable(rooms, image_folder, tmp_path):
    sheet, same, other = (np.asarray(contact_sheet(Manifest(rooms), seed=s, tile=32), float) for s in (0, 0, 1))
    assert sheet.shape[:2] == (4 * (16 + 34 + 2), COLUMNS * 34 - 2), "four sequences of at most six frames, a line each"
    assert np.array_equal(sheet, same)
    assert not np.array_equal(sheet, other)
    images = [read_rgb(file) for file in (image_folder / "scene0").iterdir()]
    thumbnails = [np.asarray(image.crop((4, 0, 44, 40)).resize((32, 32)), float) for image in images]
    assert min(np.abs(sheet[16:48, :32] - thumbnail).mean() for thumbnail in thumbnails) < 4

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


def test_folders_that_cannot_be_listed_are_named(image_folder, tmp_path, monkeypatch, caplog):
    """Those without permission are skipped, since others may own them; other errors may be of the moment."""
    scandir, code = os.scandir, errno.EACCES

    def scan(folder):
        if str(folder).endswith("scene2"):
            raise OSError(code, os.strerror(code), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    assert build("folder", image_folder, tmp_path / "m.arrow").counts == (3, 18)
    assert f"'{image_folder}/scene2'" in caplog.text
    code = errno.EIO
    with pytest.raises(DataError, match=rf"^[^\n]*{image_folder}/scene2[^\n]*$"):
        build("folder", image_folder, tmp_path / "m.arrow")


def test_inspect_counts_the_images_that_are_held_out_and_trained_on(rooms, image_folder, tmp_path, capsys):
    for scene in range(3):  # a link to one file of each
        (tmp_path / f"links/{scene}").mkdir(parents=True)
        (tmp_path / f"links/{scene}/0.png").symlink_to(image_folder / f"scene{scene}/0.png")
        (tmp_path / f"links/{scene}/1.png").write_bytes(b"another")
    build("folder", tmp_path / "links", tmp_path / "links.arrow", dataset="links")
    for files, words, held, overlap, code in (
        ([rooms], [], "1 scenes, 1 sequences, 6 images", "0 images", 0),
        ([rooms], ["--held-out", "0.5"], "2 scenes, 2 sequences, 12 images", "0 images", 0),
        ([rooms, tmp_path / "links.arrow"], ["--held-out", "0.7"], "5 scenes, 5 sequences", "2 images, such as", 1),
    ):
        assert inspect([*map(str, files), "--no-sheet", "--check", *words]) == code
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held out")]
        assert held in line
        assert f"overlap with training: {overlap}" in line
    build("folder", image_folder / "scene0", tmp_path / "one.arrow")
    assert inspect([str(tmp_path / "one.arrow"), "--no-sheet"]) == 0
    assert "nothing, since there is one scene" in capsys.readouterr().out


def test_inspect(rooms, image_folder, tmp_path, capsys):
    """Where the sheet is written, missing files and the exit code, and errors in one line."""
    assert inspect([str(rooms), "--no-sheet", "--check"]) == 0
    assert "missing: 0 of 24 images" in capsys.readouterr().out
    assert not (tmp_path / "rooms_sheet.jpg").exists()
    assert inspect([str(rooms), "--sheet", str(tmp_path / "s.jpg"), "--sequences", "2"]) == 0
    assert image_size(tmp_path / "s.jpg") == (12 * 98 - 2, 2 * (16 + 98 + 2))
    assert f"contact sheet: {tmp_path / 's.jpg'}" in capsys.readouterr().out
    for scene in range(2):
        for file in (image_folder / f"scene{scene}").iterdir():
            file.unlink()
    assert inspect([str(rooms), "--check"]) == 1
    assert (tmp_path / "rooms_sheet.jpg").stat().st_size > 0
    out = capsys.readouterr().out
    for part in ("missing: 12 of 24 images", f"  {image_folder}/scene0/0.png", "  ..."):
        assert part in out
    for words, message in (
        (["~no-such-user/m.arrow"], "~no-such-user/m.arrow"),
        ([str(rooms), "--sheet", "/proc/s.jpg"], "--sheet '/proc/s.jpg'"),
        ([str(rooms), "--sheet", "s.doc"], "--sheet 's.doc'"),
        ([str(rooms), "--sequences", "0"], "--sequences"),
        ([str(rooms), "--held-out", "1"], "--held-out"),
        ([str(rooms), str(rooms), "--sheet", "s.jpg"], "--sheet"),
    ):
        assert inspect(words) == 2
        assert re.fullmatch(f"error: [^\n]*{message}[^\n]*\n", capsys.readouterr().err)


def test_a_reader_may_close_the_pipe(rooms):
    command = [sys.executable, "-m", "fastmum.data.inspect", str(rooms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # long before the interpreter has started
    assert process.stderr.read() == ""
    assert process.wait() == 0
