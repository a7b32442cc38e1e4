"""The benchmarks of what runs on the GPU at the paper's sizes, and their page with tables and plots."""

from __future__ import annotations

import sys

import pytest

from benchmarks import report
from benchmarks.gpu.record import Record, stage_main
from benchmarks.gpu.stages import ROOT

BENCHMARKS = ("test_step.py", "test_kernels.py", "test_attention.py", "test_ragged.py")
SMALL = ("test_ragged.py",)


def measure(record: Record, small: bool, words: list[str]) -> bool:
    """Run the benchmarks and write the page; False if one fails."""
    result, page = record.file.with_name("tables-result.json"), record.file.with_name("tables.md")
    files = [str(ROOT / "benchmarks" / name) for name in (SMALL if small else BENCHMARKS)]
    options = ["--benchmark-only", "--benchmark-quiet", "-q", "-p", "no:cacheprovider", f"--benchmark-json={result}"]
    code = pytest.main([*files, *options, *(["--quick"] if small else []), *words])
    written = report.main([str(result), "--out", str(page)]) == 0
    record.headline = f"{page.name} and its plots" if written else "no results"
    return code == pytest.ExitCode.OK and written


if __name__ == "__main__":
    sys.exit(stage_main(__doc__, measure))
