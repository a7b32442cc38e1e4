"""A quick run of one group, its JSON, and its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_predictions import PREDICTIONS

from benchmarks.report import OFFLINE_MARK, main

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["--benchmark-only", "--quick", "-p", "no:cacheprovider", "-k", "gather_tokens"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[str, Path]:
    """What a run of two duels printed, and its JSON."""
    file = tmp_path_factory.mktemp("quick") / "result.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_kernels.py", *WORDS, f"--benchmark-json={file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, file


def test_quick_run_prints_a_summary(ran):
    out, _ = ran
    assert "sizes: quick: mum_tiny" in out
    assert "commit" in out
    table = out[out.index("speed-ups") :]
    assert "gather_tokens forward + backward" in table
    assert "reference / fastmum" in table


def test_json_has_every_contestant_and_the_machine(ran):
    data = json.loads(ran[1].read_text())
    seen = {(e["extra_info"]["what"], e["extra_info"]["contestant"]) for e in data["benchmarks"]}
    what = ("gather_tokens forward", "gather_tokens forward + backward")
    assert seen == {(w, c) for w in what for c in ("reference", "fastmum")}
    assert all(len(entry["stats"]["data"]) == 2 for entry in data["benchmarks"])
    assert data["machine_info"]["fastmum"]["quick"] is True
    assert data["machine_info"]["fastmum"]["torch"]


def test_page(ran, tmp_path, capsys):
    out = tmp_path / "docs" / "BENCHMARKS.md"
    out.parent.mkdir()
    assert main([str(ran[1]), "--out", str(out), "--note", "Other work shares the cores."]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 2 comparisons")
    page = out.read_text()
    assert "--quick --benchmark-json" in page
    assert "## Kernels" in page
    assert "| gather_tokens forward |" in page
    assert "| least to most of 2 |" in page
    assert "Other work shares the cores." in page
    assert OFFLINE_MARK in page
    plot = out.parent / "images" / "benchmarks" / "kernels.svg"
    assert f"]({plot.relative_to(out.parent).as_posix()})" in page
    assert "gather_tokens forward" in "".join(ElementTree.parse(plot).getroot().itertext())
    machine = json.loads(ran[1].read_text())["machine_info"]
    assert f"| device | {machine['fastmum']['device']} |" in page, "without the CPU's capability"
    assert f"| CPU | {machine['fastmum']['capability']}, " in page
    assert machine["node"] not in page.replace(machine["fastmum"]["commit"], "") or len(machine["node"]) < 6


def test_the_same_numbers_make_the_same_page(ran, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        assert main([str(ran[1]), "--out", str(tmp_path / name / "BENCHMARKS.md")]) == 0
    pages, plots = ([*tmp_path.rglob(pattern)] for pattern in ("*.md", "*.svg"))
    assert len({page.read_text() for page in pages}) == len({plot.read_text() for plot in plots}) == 1


def test_predictions_are_added(ran, tmp_path):
    offline, out = tmp_path / "offline.json", tmp_path / "BENCHMARKS.md"
    offline.write_text(json.dumps(PREDICTIONS))
    assert main([str(ran[1]), "--out", str(out), "--offline", str(offline)]) == 0
    assert "## Predictions" in out.read_text()
    assert OFFLINE_MARK not in out.read_text()


def test_other_files_are_one_line(tmp_path, capsys):
    path = tmp_path / "result.json"
    for text, message in (
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[]", "is not of pytest-benchmark"),
        ('{"benchmarks": [], "machine_info": {}}', "holds other benchmarks"),
        ('{"benchmarks": [], "machine_info": {"fastmum": {}}}', "no results to compare"),
        ('{"benchmarks": [{}], "machine_info": {"fastmum": {}}}', "cannot be used"),
    ):
        if text is not None:
            path.write_text(text)
        assert main([str(path), "--out", str(tmp_path / "out.md")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out.md").exists()


def test_runs_of_parts_are_joined(ran, tmp_path, capsys):
    data = json.loads(ran[1].read_text())
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    for part, entries in zip(parts, (data["benchmarks"][:2], data["benchmarks"][2:]), strict=True):
        part.write_text(json.dumps(data | {"benchmarks": entries}))
    out = tmp_path / "BENCHMARKS.md"
    assert main([*map(str, parts), "--out", str(out)]) == 0
    assert "2 comparisons" in capsys.readouterr().out

    data["machine_info"]["fastmum"]["sizes"] = "paper"
    parts[1].write_text(json.dumps(data))
    assert main([*map(str, parts), "--out", str(out)]) == 2
    assert "is of another sizes (paper)" in capsys.readouterr().err
    assert main([str(ran[1]), str(ran[1]), "--out", str(out)]) == 2  # everything twice
    assert "is there twice" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_one_line(ran, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(ran[1]), "--out", str(tmp_path / "file" / "BENCHMARKS.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
