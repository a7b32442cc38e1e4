"""Tests, benchmarks and a profile on a GPU: `make gpu`.

Runs the tests of kernels and attention backends on CUDA, the benchmarks at the paper's sizes and a profile of the
trainer, and writes docs/BENCHMARKS-<gpu>.md. A stage that fails is named in the page and sets the exit code; the others
still run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from benchmarks.projection import ProjectionError, read_predictions
from benchmarks.report import ReportError, read_results, write_notes, write_report

ROOT = Path(__file__).resolve().parents[1]
TESTED = ("tests/kernels", "tests/attention", "tests/benchmarks/test_reference.py")
PROFILED = (12, 14)  # steps of the trainer, after compilation and warm-up
PROFILE_LINES = 24  # lines of the table in the page


class Stage(NamedTuple):
    """A program that runs."""

    name: str
    words: list[str]  # after the interpreter's `-m`


def stages(folder: Path, quick: bool = False) -> list[Stage]:
    """The programs, which write tests.xml, result.json and run/profile to the folder."""
    first, last = PROFILED
    trainer = [
        f"run.dir={folder / 'run'}", f"train.steps={last + 1}", f"profile.steps={first}-{last}", "train.eval_batches=1",
        "train.checkpoint_every=100000", "data.scenes.count=8", "data.held_out=0.2", "train.resume=never",
    ]  # fmt: skip
    if quick:
        trainer += ["model.preset=mum_tiny", "data.image_size=64", "data.frames_per_batch=8", "data.views=[2,4]",
                    "train.precision=auto", "data.scenes.size=64", "data.scenes.count=2", "data.scenes.views=4",
                    "data.held_out=0.5"]  # fmt: skip
    return [
        Stage("tests", ["pytest", *TESTED, "-q", f"--junitxml={folder / 'tests.xml'}"]),
        Stage(
            "benchmarks",
            ["pytest", "benchmarks/", "--benchmark-only", "--benchmark-quiet", "-q", *(["--quick"] if quick else []),
             f"--benchmark-json={folder / 'result.json'}"],
        ),
        Stage("profile", ["fastmum.train", "--config", "mum_vitl16", *trainer]),
    ]  # fmt: skip


def run(stage: Stage) -> int:
    """Run a stage in the root of the checkout; returns its exit code."""
    print(f"\n=== {stage.name}: python -m {' '.join(stage.words)}", flush=True)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", *stage.words], cwd=ROOT, env=environment).returncode


def test_outcome(folder: Path, where: str) -> str:
    """A sentence about the tests, with the names of failed ones."""
    try:
        suites = ElementTree.parse(folder / "tests.xml").getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return f"**Tests of the kernels and backends on {where}: they did not finish.**"
    total, skipped, failed = 0, 0, []
    for suite in suites:
        total += int(suite.get("tests", 0))
        skipped += int(suite.get("skipped", 0))
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(f"`{case.get('classname')}.{case.get('name')}`")
    passed = total - skipped - len(failed)
    sentence = f"Tests of the kernels and backends on {where}: {passed} passed, {skipped} skipped, {len(failed)} failed"
    return f"**{sentence}: {', '.join(failed)}.**" if failed else f"{sentence}."


def profile_note(folder: Path) -> str:
    """The head of the profile's table, as Markdown."""
    tables = sorted((folder / "run" / "profile").glob("*.txt"))
    if not tables:
        return "**The profile was not written.**"
    lines = tables[-1].read_text(encoding="utf-8").splitlines()[:PROFILE_LINES]
    first, last = PROFILED
    title = f"Steps {first} to {last} of the trainer (rendered scenes), operations by self time:"
    return "\n".join(["<details><summary>Profile</summary>", "", title, "", "```", *lines, "```", "", "</details>"])


def page_name(gpu: str) -> str:
    """File name of the page: NVIDIA H200 -> BENCHMARKS-h200.md."""
    words = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia")).strip("-")
    return f"BENCHMARKS-{words}.md"


def write_page(
    out: Path, folder: Path, gpu: str, codes: Mapping[str, int], predictions: Sequence[dict[str, Any]]
) -> list[str]:
    """Write the page, with tables if there are results.

    Args:
        out: the page.
        folder: of the files that the stages wrote.
        gpu: its name.
        codes: exit codes by stage.
        predictions: from `read_predictions`.

    Returns:
        Names of the failed stages.

    Raises:
        ReportError: the page cannot be written.
    """
    failed = [name for name, code in codes.items() if code]
    tests = test_outcome(folder, gpu)
    profile = "**No profile: the trainer failed.**" if codes["profile"] else profile_note(folder)
    some = ["**Some benchmarks failed and are not in the tables.**"] if codes["benchmarks"] else []
    try:
        write_report(read_results(folder / "result.json"), out, [tests, *some, profile], predictions)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        failed = failed if codes["benchmarks"] else [*failed, "benchmarks"]
        none = f"**No tables: the benchmarks wrote no results. Failed: {', '.join(failed)}.**"
        write_notes(out, [tests, none, profile], predictions)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="for raw results (%(default)s)")
    parser.add_argument("--out", type=Path, help="the page (docs/BENCHMARKS-<gpu>.md)")
    parser.add_argument("--offline", type=Path, metavar="FILE.json", help="output of benchmarks.offline --json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as a smoke test")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device: `make gpu` measures a GPU, `make benchmark` a CPU", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    folder, out = args.folder.resolve(), args.out or ROOT / "docs" / page_name(gpu)
    try:
        predictions = [read_predictions(args.offline)] if args.offline else []
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tests.xml", "result.json"):
            (folder / name).unlink(missing_ok=True)  # of an earlier run
        shutil.rmtree(folder / "run" / "profile", ignore_errors=True)
        codes = {stage.name: run(stage) for stage in stages(folder, args.quick)}
        failed = write_page(out, folder, gpu, codes, predictions)
    except (OSError, ProjectionError, ReportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{out}; raw numbers, tests and trace in {folder}")
    if failed:
        print(f"error: failed: {', '.join(failed)}; see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
