"""A quick run of one group, its JSON, and its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_results import PREDICTIONS

from benchmarks.report import OFFLINE_MARK, main

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["--benchmark-only", "--quick", "-p", "no:cacheprovider", "-k", "gather_tokens"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[str, Path]:
    """The output of a run of two duels, and its JSON."""
    file = tmp_path_factory.mktemp("quick") / "result.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_kernels.py", *WORDS, f"--benchmark-json={file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, file


def refusal(capsys, *words: str | Path) -> str:
    """The error, which is one line."""
    assert main([*map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_quick_run_prints_a_summary_and_writes_json(ran):
    out, file = ran
    assert "sizes: quick: mum_tiny" in out
    assert "commit" in out
    table = out[out.index("speed-ups") :]
    what = ("gather_tokens forward", "gather_tokens forward + backward")
    assert all(text in table for text in (what[1], "reference / fastmum"))
    data = json.loads(file.read_text())
    seen = {(e["extra_info"]["what"], e["extra_info"]["contestant"]) for e in data["benchmarks"]}
    assert seen == {(w, c) for w in what for c in ("reference", "fastmum")}
    assert all(len(entry["stats"]["data"]) == 2 for entry in data["benchmarks"])
    assert data["machine_info"]["fastmum"]["quick"] is True
    assert data["machine_info"]["fastmum"]["torch"]


def test_page(ran, tmp_path, capsys):
    machine = json.loads(ran[1].read_text())["machine_info"]
    pages, plots = [], []
    for name in ("docs", "again"):
        out = tmp_path / name / "BENCHMARKS.md"
        out.parent.mkdir()
        assert main([str(ran[1]), "--out", str(out), "--note", "Other work shares the cores."]) == 0
        assert capsys.readouterr().out.startswith(f"{out}: 2 comparisons")
        pages.append(out.read_text())
        plots.append(out.parent / "images" / "benchmarks" / "kernels.svg")
    page, plot = pages[0], plots[0]
    for text in (
        "--quick --benchmark-json", "## Kernels", "| gather_tokens forward |", "| least to most of 2 |",
        "Other work shares the cores.", OFFLINE_MARK, f"]({plot.relative_to(tmp_path / 'docs').as_posix()})",
        f"| device | {machine['fastmum']['device']} |", f"| CPU | {machine['fastmum']['capability']}, ",
    ):  # fmt: skip
        assert text in page
    assert "gather_tokens forward" in "".join(ElementTree.parse(plot).getroot().itertext())
    assert machine["node"] not in page.replace(machine["fastmum"]["commit"], "") or len(machine["node"]) < 6
    assert len(set(pages)) == len({plot.read_text() for plot in plots}) == 1  # the same numbers, the same page


def test_predictions_are_added(ran, tmp_path):
    offline, out = tmp_path / "offline.json", tmp_path / "BENCHMARKS.md"
    offline.write_text(json.dumps(PREDICTIONS))
    assert main([str(ran[1]), "--out", str(out), "--offline", str(offline)]) == 0
    assert "## Predictions" in out.read_text()
    assert OFFLINE_MARK not in out.read_text()


def test_other_files_are_refused(ran, tmp_path, capsys):
    path, out = tmp_path / "result.json", tmp_path / "out.md"
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
        assert message in refusal(capsys, path, "--out", out)
        assert not out.exists()
    assert refusal(capsys, ran[1], "--out", path / "BENCHMARKS.md")  # the folder is a file


def test_runs_of_parts_are_joined(ran, tmp_path, capsys):
    data = json.loads(ran[1].read_text())
    parts, out = [tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "BENCHMARKS.md"
    for part, entries in zip(parts, (data["benchmarks"][:2], data["benchmarks"][2:]), strict=True):
        part.write_text(json.dumps(data | {"benchmarks": entries}))
    assert main([*map(str, parts), "--out", str(out)]) == 0
    assert "2 comparisons" in capsys.readouterr().out
    data["machine_info"]["fastmum"]["sizes"] = "paper"
    parts[1].write_text(json.dumps(data))
    assert "(paper)" in refusal(capsys, *parts, "--out", out)
    assert "is there twice" in refusal(capsys, ran[1], ran[1], "--out", out)
