"""The tests of kernels and attention; failures are written as they come, and all results as XML in the end."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from benchmarks.gpu.record import Record, stage_main
from benchmarks.gpu.stages import ROOT

TESTED = ("tests/kernels", "tests/attention")
SMALL = ("tests/kernels/test_dispatch.py::test_choice",)
PROCESSES = 6  # that compile kernels, if pytest-xdist is installed
REASON = 160  # characters of a failure's reason


class Outcomes:
    """A plugin of pytest that counts and records outcomes."""

    def __init__(self, record: Record) -> None:
        self.record, self.counts = record, dict.fromkeys(("passed", "skipped", "failed"), 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of a test: an error of a fixture counts as a failure, and its test as no more."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else report.longreprtext).strip().partition("\n")[0]
            self.record.row(test=report.nodeid, failed=reason[:REASON])
        self.headline()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self.counts["failed"] += 1
            self.record.row(test=report.nodeid, failed=report.longreprtext.strip().splitlines()[-1][:REASON])

    def headline(self) -> None:
        """The counts so far."""
        self.record.headline = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
        if not sum(self.counts.values()) % 50:
            self.record.write()


def measure(record: Record, small: bool, words: list[str]) -> bool:
    """Run the tests; False if one failed, or none ran."""
    outcomes = Outcomes(record)
    parallel = ["-n", str(PROCESSES)] if not small and importlib.util.find_spec("xdist") else []
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--rootdir={ROOT}",
               f"--junitxml={record.file.with_name('tests.xml')}"]  # fmt: skip
    code = pytest.main([*(SMALL if small else TESTED), *options, *parallel, *words], plugins=[outcomes])
    outcomes.headline()
    if code == pytest.ExitCode.INTERRUPTED:
        record.headline += "; not all ran"
    return code == pytest.ExitCode.OK


if __name__ == "__main__":
    sys.exit(stage_main(__doc__, measure))
