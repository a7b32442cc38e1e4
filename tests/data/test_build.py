"""The command line that builds manifests: whole files, identical ones, and one line for what is wrong."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from colmap_files import View, write_text_model

from fastmum.data.build import build, main
from fastmum.data.builders import BUILDERS
from fastmum.data.builders.base import Options
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifest


@pytest.fixture
def rooms(tmp_path):
    """Twenty folders of three files."""
    for scene in range(20):
        folder = tmp_path / f"raw/scene{scene}"
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"{i}.jpg").touch()
    return tmp_path / "raw"


def test_the_data_sets_of_the_paper_and_the_general_ones():
    paper = ["megadepth", "megascenes", "co3d", "dl3dv", "hypersim", "wildrgbd", "streetview3d", "realestate10k",
             "scannetpp", "blendedmvs", "arkitscenes", "imagenet"]  # fmt: skip
    assert list(BUILDERS) == [*paper, "folder", "colmap", "video", "scenes"]


def test_every_builder_is_in_the_documentation(request):
    text = (request.config.rootpath / "docs/data.md").read_text()
    table = {line.split("|")[1].strip(" `"): line for line in text.splitlines() if line.startswith("| `")}
    for name, builder in BUILDERS.items():
        assert name in table
        assert (builder.released is None) == ("| the same |" in table[name])


def test_a_manifest_says_how_it_was_made(rooms, tmp_path, capsys):
    out = tmp_path / "deep/er/m.arrow"
    assert main(["folder", "--root", str(rooms), "--out", str(out), "--seed", "3", "--min-frames", "2"]) == 0
    assert f"{out}: 20 sequences, 60 frames of 20 parts" in capsys.readouterr().out
    assert Manifest.open(out).metadata == {
        "builder": "folder", "rule": "paper", "seed": 3, "options": {"min_frames": 2, "single": False},
        "source": str(rooms), "root": str(rooms), "counts": {"sequences": 20, "frames": 60},
    }  # fmt: skip
    assert Manifest.open(out).datasets == ("folder",)


def test_parts_that_give_nothing_are_counted(rooms, tmp_path, capsys):
    (rooms / "scene3/0.jpg").unlink()
    main(["folder", "--root", str(rooms), "--out", str(tmp_path / "m"), "--min-frames", "3", "--dataset", "mine"])
    assert "19 sequences, 57 frames of 20 parts; 1 gave none" in capsys.readouterr().out
    assert Manifest.open(tmp_path / "m").datasets == ("mine",)


def test_the_bytes_depend_neither_on_the_run_nor_on_the_workers(rooms, tmp_path):
    for name, workers in (("a", 0), ("b", 1), ("c", 2)):
        build("folder", rooms, tmp_path / name, workers=workers)
    first = (tmp_path / "a").read_bytes()
    assert (tmp_path / "b").read_bytes() == first
    assert (tmp_path / "c").read_bytes() == first


def test_frames_below_the_manifest_move_with_it(rooms, tmp_path):
    build("folder", rooms, tmp_path / "m.arrow")
    (tmp_path / "moved").mkdir()
    for name in ("raw", "m.arrow"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    manifest = Manifest.open(tmp_path / "moved/m.arrow")
    assert manifest.metadata["root"] == "raw"
    assert manifest.file(0).is_file()


def test_random_numbers_are_those_of_seed_and_part():
    draws = {
        (seed, part): Options(rule="paper", seed=seed).rng(part).integers(1 << 60)
        for seed in (0, 1)
        for part in ("a", "b", "\udcff")
    }
    assert len(set(draws.values())) == 6
    assert Options(rule="paper", seed=1).rng("b").integers(1 << 60) == draws[1, "b"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_part_reaches_the_user_and_leaves_nothing(tmp_path, workers):
    for scene in ("a", "b", "c"):
        (tmp_path / f"raw/{scene}/dslr/resized_undistorted_images").mkdir(parents=True)
    with pytest.raises(DataError, match=r"a/dslr/train_test_lists\.json'"):
        build("scannetpp", tmp_path / "raw", tmp_path / "m.arrow", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--root", "nowhere"], "--root is 'nowhere', but there is no such folder"),
        (["--out", "raw"], "--out is 'raw', but that is a folder"),
        (["--out", "raw/scene0/0.jpg/m"], "but its folder cannot be created"),
        (["--out", "/proc/m.arrow"], "cannot be written"),
        (["--seed", "-1"], "--seed is -1, but must be at least 0"),
        (["--workers", "-1"], "--workers is -1, but must be at least 0"),
        (["--min-frames", "0"], "--min-frames is 0, but must be at least 1"),
        (
            ["--min-frames", "9"],
            "nothing under 'raw' makes a sequence of folder of at least 9 frames (--min-frames); expected: any",
        ),
    ],
)
def test_what_cannot_work_is_one_line(rooms, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["folder", "--root", "raw", "--out", "m.arrow", *words]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert message in error[0].replace(f"'{tmp_path}/", "'")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_another_layout_names_the_one_expected(tmp_path, capsys, name):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/notes.txt").touch()
    assert main([name, "--root", str(tmp_path / "raw"), "--out", str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert BUILDERS[name].layout in error
    assert error.count("\n") == 1


def test_a_bound_above_is_one_too(tmp_path, capsys):
    assert main(["video", "--root", str(tmp_path), "--out", str(tmp_path / "m"), "--quality", "500"]) == 2
    assert capsys.readouterr().err == "error: --quality is 500, but must be at most 95\n"


def test_help_lists_data_sets_layouts_and_rules(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, builder in BUILDERS.items():
        assert f"{name} " in text
        assert builder.layout in text
    with pytest.raises(SystemExit, match="0"):
        main(["streetview3d", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--rule released: chunks of 24, the last one takes the rest" in text
    assert "--chunk" in text


def test_an_option_of_another_builder_is_refused(rooms, tmp_path):
    with pytest.raises(TypeError, match="folder has no option"):
        build("folder", rooms, tmp_path / "m", chunk=3)


def slow_build(tmp_path, name, workers):
    """A build in a process of its own, in the middle of writing."""
    if name == "colmap":
        pytest.importorskip("pycolmap")
    script = (
        "import signal, sys, time; from fastmum.data import build, manifest_writer as manifest\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "add = manifest._Spool.add\n"
        "manifest._Spool.add = lambda *a: (add(*a), print('added', flush=True), time.sleep(60))\n"
        f"sys.exit(build.main(['{name}', '--root', sys.argv[1], '--out', sys.argv[2], '--workers', '{workers}']))"
    )
    for scene in range(3):
        folder = tmp_path / f"frames/{scene}"
        write_text_model(folder, {f"{i}.jpg": View((1, 2)) for i in range(2)})
        for i in range(2):
            (folder / f"{i}.jpg").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "frames"), str(tmp_path / "m.arrow")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "added\n"
    return process


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["folder", "colmap"])
def test_stopped_from_outside_it_leaves_what_was_there(tmp_path, number, workers, name):
    """Also with pycolmap, whose import takes the signals for itself."""
    out = tmp_path / "m.arrow"
    out.write_text("older")
    process = slow_build(tmp_path, name, workers)
    process.send_signal(number)
    began = time.monotonic()
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 128 + number, errors
    assert "nothing was written" in errors
    assert "Traceback" not in errors
    assert time.monotonic() - began < 50
    assert out.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames", "m.arrow"]


def test_workers_leave_when_the_build_is_killed(tmp_path):
    """They hold the pipe that they inherited, which ends with the last of them."""
    process = slow_build(tmp_path, "folder", 2)
    process.kill()
    process.communicate(timeout=50)
    assert process.returncode == -signal.SIGKILL


def test_poses_survive_the_way_through_processes(tmp_path):
    for scene in ("a", "b"):
        folder = tmp_path / f"raw/{scene}"
        (folder / "blended_images").mkdir(parents=True)
        (folder / "cams").mkdir()
        for i in range(2):
            (folder / f"blended_images/{i:08d}.jpg").touch()
            rows = "\n".join(" ".join(map(str, row)) for row in np.eye(4) * (i + 1))
            (folder / f"cams/{i:08d}_cam.txt").write_text(f"extrinsic\n{rows}\nintrinsic\n1 0 3\n0 2 4\n0 0 1\n")
    build("blendedmvs", tmp_path / "raw", tmp_path / "m", workers=2)
    manifest = Manifest.open(tmp_path / "m")
    assert manifest.camera_arrays(3)[1][0, 0] == 2
    assert manifest.camera_arrays(1)[0].tolist() == [1, 2, 3, 4]
