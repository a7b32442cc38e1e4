"""The command that builds manifests: whole files, identical bytes, and one line per error."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from fastmum.data.build import build, main
from fastmum.data.builders import BUILDERS
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifest


@pytest.fixture
def rooms(tmp_path):
    """Twenty folders of three files."""
    for scene in range(20):
        (tmp_path / f"raw/scene{scene}").mkdir(parents=True)
        for i in range(3):
            (tmp_path / f"raw/scene{scene}/{i}.jpg").touch()
    return tmp_path / "raw"


def test_a_manifest_says_how_it_was_made(rooms, tmp_path, capsys):
    out = tmp_path / "deep/er/m.arrow"
    (rooms / "scene3/0.jpg").unlink()
    words = ["--out", str(out), "--seed", "3", "--min-frames", "3", "--dataset", "mine"]
    assert main(["folder", "--root", str(rooms), *words]) == 0
    assert f"{out}: 19 sequences, 57 frames of 20 parts; 1 gave none" in capsys.readouterr().out
    assert Manifest(out).metadata == {
        "builder": "folder", "rule": "paper", "seed": 3, "options": {"min_frames": 3, "single": False},
        "source": str(rooms), "root": str(rooms), "counts": {"sequences": 19, "frames": 57},
    }  # fmt: skip
    assert Manifest(out).datasets == ("mine",)


def test_the_bytes_depend_neither_on_the_run_nor_on_the_workers(tmp_path):
    for scene in ("a", "b", "c"):
        folder = tmp_path / f"raw/{scene}"
        for name in ("blended_images", "cams", "rendered_depth_maps"):
            (folder / name).mkdir(parents=True)
        for i in range(2):
            (folder / f"blended_images/{i:08d}.jpg").touch()
            (folder / f"rendered_depth_maps/{i:08d}.pfm").touch()
            rows = "\n".join(" ".join(map(str, row)) for row in np.eye(4) * (i + 1))
            (folder / f"cams/{i:08d}_cam.txt").write_text(f"extrinsic\n{rows}\nintrinsic\n1 0 3\n0 2 4\n0 0 1\n")
    for name, workers in (("0", 0), ("1", 1), ("2", 2)):
        assert build("blendedmvs", tmp_path / "raw", tmp_path / name, workers=workers).counts == (3, 6)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    manifest = Manifest(tmp_path / "2")
    assert manifest.camera_arrays(3)[1][0, 0] == 2
    assert manifest.camera_arrays(1)[0].tolist() == [1, 2, 3, 4]
    assert manifest.depth_file(5)[0].name == "00000001.pfm"


def test_frames_below_the_manifest_move_with_it(rooms, tmp_path):
    with pytest.raises(TypeError, match="folder has no option"):
        build("folder", rooms, tmp_path / "m.arrow", chunk=3)
    build("folder", rooms, tmp_path / "m.arrow")
    (tmp_path / "moved").mkdir()
    for name in ("raw", "m.arrow"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    manifest = Manifest(tmp_path / "moved/m.arrow")
    assert manifest.metadata["root"] == "raw"
    assert manifest.datasets == ("folder",)
    assert manifest.file(0).is_file()


def test_an_error_in_a_part_reaches_the_user_and_leaves_nothing(tmp_path):
    for scene in ("a", "b", "c"):
        (tmp_path / f"raw/{scene}/dslr/resized_undistorted_images").mkdir(parents=True)
    with pytest.raises(DataError, match=r"a/dslr/train_test_lists\.json'"):
        build("scannetpp", tmp_path / "raw", tmp_path / "m.arrow", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_errors_are_one_line(rooms, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["--root", "nowhere"], "--root is 'nowhere'"),
        (["--out", "raw"], "--out is 'raw'"),
        (["--out", "raw/scene0/0.jpg/m"], "--out is 'raw/scene0/0.jpg/m'"),
        (["--out", "/proc/m.arrow"], "/proc/m.arrow"),
        (["--seed", "-1"], "--seed is -1"),
        (["--min-frames", "9"], "--min-frames"),
    ):
        assert main(["folder", "--root", "raw", "--out", "m.arrow", *words]) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert message in error.replace(f"{tmp_path}/", "")
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    assert main(["video", "--root", "raw", "--out", "m", "--quality", "500"]) == 2
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


def slow_build(root, out, workers):
    """A build in a separate process that waits in the middle of writing."""
    script = (
        "import signal, sys, time; from fastmum.data import build, manifest_writer as writer\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "add = writer._Spool.add\n"
        "writer._Spool.add = lambda *a: (add(*a), print('added', flush=True), time.sleep(60))\n"
        "sys.exit(build.main(sys.argv[1:]))"
    )
    words = "folder", "--root", str(root), "--out", str(out), "--workers", str(workers)
    command = [sys.executable, "-c", script, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "added\n"
    return process


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 0), (signal.SIGKILL, 2)])
def test_a_signal_leaves_the_older_file_and_no_worker(rooms, tmp_path, number, workers):
    out = tmp_path / "m.arrow"
    out.write_text("older")
    process = slow_build(rooms, out, workers)
    process.send_signal(number)
    _, errors = process.communicate(timeout=50)  # workers hold the inherited pipe, which closes with the last of them
    assert out.read_text() == "older"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 128 + number, errors
    assert "nothing was written" in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.arrow", "raw"]
