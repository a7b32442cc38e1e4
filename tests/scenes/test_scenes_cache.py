"""Scenes are the same bytes every time, are rendered once, and are whole or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fastmum.scenes import ensure_scenes, files, photos, scene_dirs
from fastmum.scenes.__main__ import main

TINY = {"views": 2, "size": 32, "progress": False}
SETTINGS = files.Settings(seed=0, views=2, size=32)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if not path.name.startswith("scene_")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two tiny scenes rendered by two processes."""
    return ensure_scenes(2, cache_dir=tmp_path_factory.mktemp("tiny"), workers=2, **TINY)


def test_bytes_do_not_depend_on_workers_or_count(tiny, tmp_path):
    assert leftovers(tiny) == []
    again = tmp_path / "scenes"
    again.mkdir()
    files.write_scene(again, 1, SETTINGS)  # scene 1 on its own, in this process
    assert content(again / "scene_0001") == content(tiny / "scene_0001")
    assert set(content(tiny / "scene_0000")) == {
        "000.png", "001.png", "depth/000.png", "depth/001.png", "cameras.json",
    }  # fmt: skip
    assert content(tiny / "scene_0000")["000.png"] != content(tiny / "scene_0001")["000.png"]


def test_a_second_call_renders_nothing(tiny, monkeypatch):
    monkeypatch.setattr(files, "write_scene", lambda *_: pytest.fail("rendered again"))
    assert ensure_scenes(2, cache_dir=tiny.parent, workers=1, **TINY) == tiny
    assert scene_dirs(tiny, 1) == [tiny / "scene_0000"]
    with pytest.raises(FileNotFoundError, match="scene_0002"):
        scene_dirs(tiny, 3)


@pytest.mark.parametrize("damage", ["001.png", "depth/000.png", "cameras.json", "empty"])
def test_a_broken_scene_is_rendered_again(tiny, damage):
    before = content(tiny / "scene_0000")
    if damage == "empty":
        (tiny / "scene_0000" / "000.png").write_bytes(b"")
    else:
        (tiny / "scene_0000" / damage).unlink()
    assert not files.is_complete(tiny / "scene_0000", SETTINGS)
    ensure_scenes(2, cache_dir=tiny.parent, workers=1, **TINY)
    assert content(tiny / "scene_0000") == before
    assert leftovers(tiny) == []


def test_an_interrupted_render_leaves_nothing(tmp_path):
    def interrupt():
        assert leftovers(tmp_path), "rendering should happen beside the final place"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_scene(tmp_path, 0, SETTINGS, interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_interrupted_run_of_processes_leaves_only_whole_scenes(tmp_path):
    command = [sys.executable, "-m", "fastmum.scenes", "--out", str(tmp_path), "--count", "8", "--workers", "2"]
    run = subprocess.Popen(
        [*command, "--views", "40", "--size", "64"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.time() + 20
    while not any(tmp_path.glob(".scene_*.part/000.png")) and time.time() < end:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    _, messages = run.communicate(timeout=20)
    assert run.returncode == 130
    assert "stopped" in messages
    assert "Traceback" not in messages
    assert leftovers(tmp_path) == []
    settings = files.Settings(seed=0, views=40, size=64)
    assert all(files.is_complete(folder, settings) for folder in tmp_path.iterdir())


def test_a_faster_twin_wins(tiny, tmp_path):
    """Another process puts the same scene in place while this one renders it."""
    other = tmp_path / "scene_0000"

    def twin():
        if not other.exists():
            files.shutil.copytree(tiny / "scene_0000", other)
            (other / "mark").touch()

    files.write_scene(tmp_path, 0, SETTINGS, twin)
    assert (other / "mark").exists(), "the whole scene that was there first stays"
    assert leftovers(tmp_path) == []


def test_a_dead_process_is_reported(tmp_path, monkeypatch, capsys):
    dead = tmp_path / "dead"
    dead.write_text("#!/bin/sh\nexit 3\n")
    dead.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dead))
    assert main(["--out", str(tmp_path / "out"), "--count", "2", "--views", "1", "--size", "16", "--workers", "2"]) == 2
    assert "ended early (exit code 3)" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_photographs_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "MATTER", ("sand.png",))
    with pytest.raises(FileNotFoundError, match=r"lacks sand\.png: reinstall scikit-image"):
        ensure_scenes(1, cache_dir=tmp_path, **TINY)


def test_old_leftovers_go_and_fresh_ones_stay(tmp_path):
    for name, age in (("old", 2 * files.STALE_SECONDS), ("new", 0)):
        part = tmp_path / f".scene_0000-{name}.part"
        part.mkdir()
        os.utime(part, (time.time() - age,) * 2)
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".scene_0000-new.part"]


@pytest.mark.parametrize(
    ("argument", "value"), [("count", 0), ("views", 0), ("size", 8), ("seed", -1), ("workers", -1)]
)
def test_bad_arguments_are_named(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be at least .*got {value}"):
        ensure_scenes(cache_dir=tmp_path, **{argument: value})
    assert list(tmp_path.iterdir()) == []


def test_the_cache_variable_is_obeyed(tiny, monkeypatch):
    monkeypatch.setenv("FASTMUM_CACHE", str(tiny.parent))
    assert ensure_scenes(2, **TINY) == tiny


def test_scenes_of_other_settings_are_not_overwritten(tiny, capsys):
    before = content(tiny)
    assert main(["--out", str(tiny), "--count", "2", "--views", "2", "--size", "32", "--seed", "7"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert content(tiny) == before


def test_command_line(tiny, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    options = ["--count", "2", "--views", "2", "--size", "32"]
    assert main(["--out", str(tiny), *options, "--contact-sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert str(tiny) in out
    assert "all were there already" in out
    assert main(["--out", str(tmp_path), *options[:1], "1", *options[2:], "--workers", "0"]) == 0
    assert "1 rendered" in capsys.readouterr().out
    assert Image.open(sheet).size == (6 * 130 - 2, 2 * 130 - 2)


def test_command_line_errors_are_one_line(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for options, name in (
        (["--out", str(blocked / "inside")], str(blocked)),
        (["--count", "0"], "count"),
        (["--out", str(tmp_path), "--size", "x"], None),
    ):
        if name is None:
            with pytest.raises(SystemExit):
                main(options)
            assert "--size" in capsys.readouterr().err
            continue
        assert main(options) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ")
        assert name in message


def test_a_script_without_a_main_guard_may_call_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom fastmum.scenes import ensure_scenes\n"
        f"print(ensure_scenes(2, 1, 16, 0, Path({str(tmp_path)!r}), workers=2, progress=False))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    root = Path(done.stdout.strip())
    assert [folder.name for folder in sorted(root.iterdir())] == ["scene_0000", "scene_0001"]
    assert json.loads((root / "scene_0000" / "cameras.json").read_text())["size"] == [16, 16]


def test_importing_is_cheap():
    code = "import sys, fastmum.scenes; print([m for m in ('numpy', 'torch', 'PIL', 'skimage') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
