"""Scenes have the same bytes every time, are rendered once, and are complete or absent."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fastmum.scenes import ScenesError, ensure_scenes, files, scene_dirs, textures
from fastmum.scenes.__main__ import main
from fastmum.scenes.cache import Settings, is_complete

TINY = {"views": 2, "size": 32, "progress": False}
SETTINGS = Settings(seed=0, views=2, size=32)
OPTIONS = ["--count", "2", "--views", "2", "--size", "32"]


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
    files.write_scene(tmp_path, 1, SETTINGS)  # only scene 1, in this process
    assert content(tmp_path / "scene_0001") == content(tiny / "scene_0001")
    first = content(tiny / "scene_0000")
    assert set(first) == {"000.png", "001.png", "depth/000.png", "depth/001.png", "cameras.json"}
    assert first["000.png"] != content(tiny / "scene_0001")["000.png"]
    with pytest.raises(ScenesError, match="scene_0002"):
        scene_dirs(tiny, 3)


def test_only_incomplete_scenes_are_rendered_again(tiny, monkeypatch):
    before, folder = content(tiny), tiny / "scene_0000"
    rendered, write_scene = [], files.write_scene
    monkeypatch.setattr(files, "write_scene", lambda *words: rendered.append(words[1]) or write_scene(*words))
    monkeypatch.setenv("FASTMUM_CACHE", str(tiny.parent))
    for damage in (
        lambda: None,
        (folder / "001.png").unlink,
        (folder / "depth/000.png").unlink,
        (folder / "cameras.json").unlink,
        lambda: (folder / "000.png").write_bytes(b""),
    ):
        damage()
        assert ensure_scenes(2, workers=1, **TINY) == tiny
        assert content(tiny) == before
    assert rendered == [0, 0, 0, 0]


def test_interrupted_processes_leave_only_complete_scenes(tmp_path):
    words = [sys.executable, *f"-m fastmum.scenes --out {tmp_path} --count 8 --workers 2 --views 40 --size 64".split()]
    # A shell's background job ignores SIGINT, and its children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    end = time.time() + 60
    while not any(tmp_path.glob(".scene_*.part/000.png")) and time.time() < end:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    _, messages = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "stopped" in messages
    assert "Traceback" not in messages
    assert leftovers(tmp_path) == []
    assert all(is_complete(folder, Settings(seed=0, views=40, size=64)) for folder in tmp_path.iterdir())


def test_a_faster_process_wins(tiny, tmp_path):
    other = tmp_path / "scene_0000"

    def finish_first():
        shutil.copytree(tiny / "scene_0000", other, dirs_exist_ok=True)
        (other / "mark").touch()

    files.write_scene(tmp_path, 0, SETTINGS, finish_first)
    assert (other / "mark").exists(), "the complete scene that was there first stays"
    assert leftovers(tmp_path) == []


def test_programs_that_need_the_same_scenes_share_the_work(tmp_path, monkeypatch):
    rendered, write_scene, views = [], files.write_scene, []

    def write(root, index, *words):
        rendered.append(index)
        if len(rendered) == 1:  # the other program renders the rest meanwhile
            files.write_scenes(root, [i for i in range(3) if i != index], SETTINGS, lambda: None)
        write_scene(root, index, *words)

    monkeypatch.setattr(files, "write_scene", write)
    files.write_scenes(tmp_path, range(3), SETTINGS, lambda: views.append(None))
    assert sorted(rendered) == [0, 1, 2]
    assert len(views) == 3 * SETTINGS.views


def test_failed_processes_are_reported(tmp_path, monkeypatch, capsys):
    out, dead = tmp_path / "out", tmp_path / "dead"
    dead.write_text("#!/bin/sh\nexit 3\n")
    dead.chmod(0o755)
    monkeypatch.setattr(files, "remove_leftovers", Path.rmdir)  # the workers find no folder
    assert main(["--out", str(out), *OPTIONS, "--workers", "2"]) == 2
    assert str(out) in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", str(dead))
    assert main(["--out", str(out), *OPTIONS, "--workers", "2"]) == 2
    assert "exit code 3" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_old_leftovers_go_and_fresh_ones_stay(tmp_path):
    for name, age in (("old", 2 * files.STALE_SECONDS), ("new", 0)):
        part = tmp_path / f".scene_0000-{name}.part"
        part.mkdir()
        os.utime(part, (time.time() - age,) * 2)
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".scene_0000-new.part"]


def test_command_line(tiny, tmp_path, monkeypatch, capsys):
    sheet, blocked, before = tmp_path / "sheet.png", tmp_path / "file", content(tiny)
    assert main(["--out", str(tiny), *OPTIONS, "--contact-sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert str(tiny) in out
    assert "rendered" not in out
    assert Image.open(sheet).size == (6 * 130 - 2, 2 * 130 - 2)
    assert main(["--out", str(tmp_path), *OPTIONS, "--count", "1", "--workers", "0"]) == 0
    assert "1 rendered" in capsys.readouterr().out
    blocked.write_text("in the way")
    least = {"count": 0, "views": 0, "size": 15, "seed": -1, "workers": -1}
    monkeypatch.setattr(textures, "GROUND", ("sand.png",))
    for options, name in (
        (["--out", str(blocked / "inside"), "--count", "1"], "sand.png"),
        (["--contact-sheet", str(tmp_path / "sheet.nothing")], "sheet.nothing"),
        (["--seed", "7"], "other settings"),
        *((f"--{name} {value}".split(), name) for name, value in least.items()),
    ):
        assert main(["--out", str(tiny), *OPTIONS, *options]) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ")
        assert name in message
    monkeypatch.undo()
    assert main(["--out", str(blocked / "inside")]) == 2
    assert str(blocked) in capsys.readouterr().err
    assert content(tiny) == before


def test_opening_rendered_scenes_imports_no_renderer(tiny):
    code = (
        "import sys, fastmum.scenes; from pathlib import Path\n"
        f"fastmum.scenes.ensure_scenes(2, 2, 32, 0, Path({str(tiny.parent)!r}))\n"
        "print([m for m in ('numpy', 'torch', 'PIL', 'skimage', 'fastmum.scenes.files') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
