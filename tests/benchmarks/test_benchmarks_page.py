"""A quick run of one group, its JSON, and its page."""

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


def test_summary_and_page(ran, tmp_path, capsys):
    head, _, table = ran[0].partition("speed-ups")
    assert all(text in head for text in ("sizes: quick: mum_tiny", "commit"))
    assert all(text in table for text in ("gather_tokens forward + backward", "reference / fastmum"))
    machine = json.loads(ran[1].read_text())["machine_info"]
    out, plot = tmp_path / "docs/BENCHMARKS.md", tmp_path / "docs/images/benchmarks/kernels.svg"
    written = []
    for _ in range(2):
        assert main([str(ran[1]), "--out", str(out), "--note", "Other work shares the cores."]) == 0
        assert capsys.readouterr().out.startswith(f"{out}: 2 comparisons")
        written.append((out.read_text(), plot.read_text()))
    assert written[0] == written[1]
    page = written[0][0]
    for text in (
        "--quick --benchmark-json", "## Kernels", "| gather_tokens forward |", "| gather_tokens forward + backward |",
        "| least to most of 2 |", "Other work shares the cores.", OFFLINE_MARK, "](images/benchmarks/kernels.svg)",
        f"| device | {machine['fastmum']['device']} |", f"| CPU | {machine['fastmum']['capability']}, ",
    ):  # fmt: skip
        assert text in page
    assert "gather_tokens forward" in "".join(ElementTree.parse(plot).getroot().itertext())
    assert machine["node"] not in page.replace(machine["fastmum"]["commit"], "") or len(machine["node"]) < 6


def test_other_files_are_refused(ran, tmp_path, refusal):
    path, out = tmp_path / "result.json", tmp_path / "out.md"
    for text, message in (
        (None, "cannot be read"),
        ("{", "JSON"),
        ("[]", "pytest-benchmark"),
        ('{"benchmarks": [], "machine_info": {}}', "other benchmarks"),
        ('{"benchmarks": [], "machine_info": {"fastmum": {}}}', "no results"),
        ('{"benchmarks": [{}], "machine_info": {"fastmum": {}}}', "cannot be used"),
    ):
        if text is not None:
            path.write_text(text)
        assert message in refusal(main, path, "--out", out)
        assert not out.exists()
    refusal(main, ran[1], "--out", path / "BENCHMARKS.md")  # the folder is a file


def test_runs_of_parts_are_joined_and_predictions_added(ran, tmp_path, capsys, refusal):
    data = json.loads(ran[1].read_text())
    parts, out, offline = [tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "BENCHMARKS.md", tmp_path / "offline"
    offline.write_text(json.dumps(PREDICTIONS))
    for part, entries in zip(parts, (data["benchmarks"][:2], data["benchmarks"][2:]), strict=True):
        part.write_text(json.dumps(data | {"benchmarks": entries}))
    assert main([*map(str, parts), "--out", str(out), "--offline", str(offline)]) == 0
    assert "2 comparisons" in capsys.readouterr().out
    assert "## Predictions" in out.read_text()
    assert OFFLINE_MARK not in out.read_text()
    data["machine_info"]["fastmum"]["sizes"] = "paper"
    parts[1].write_text(json.dumps(data))
    assert "(paper)" in refusal(main, *parts, "--out", out)
    assert "is there twice" in refusal(main, ran[1], ran[1], "--out", out)
