"""Header with machine and versions, fixtures with sizes and duels, and a table at the end."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.duel import Duel
from benchmarks.results import results_of, text_table
from benchmarks.sizes import Sizes, pick_sizes
from fastmum.engine.device import keep_freed_memory

SIZES_KEY = pytest.StashKey[Sizes]()
COMMIT_KEY = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="benchmarks: tiny sizes and two rounds, for CI")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SIZES_KEY] = pick_sizes(config.getoption("quick"))
    config.stash[COMMIT_KEY] = commit()  # before files change
    keep_freed_memory()  # for both sides, whatever ran before


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Machine, versions, commit, sizes."""
    about = describe_machine()
    return [
        f"machine: {about['machine']}, {about['device']}; {about['capability']} on the CPU",
        f"versions: torch {about['torch']}, Python {platform.python_version()}; commit {config.stash[COMMIT_KEY]}",
        f"sizes: {config.stash[SIZES_KEY]}",
    ]


def describe_machine() -> dict[str, str]:
    """Hardware and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "machine": f"{platform.machine()} {platform.system()}",
        "device": device,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else "",
    }


def commit() -> str:
    """Commit of the checkout, with "-dirty" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    out = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return out.stdout.strip() or "unknown"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds the machine, the commit and the sizes to the JSON."""
    machine_info["fastmum"] = describe_machine() | {
        "commit": config.stash[COMMIT_KEY],
        "sizes": str(config.stash[SIZES_KEY]),
        "quick": config.getoption("quick"),
    }


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints ratios with their spread by group."""
    lines = text_table(results_of(entry.as_dict() for entry in config._benchmarksession.benchmarks if entry))
    if lines:
        terminalreporter.section(f"speed-ups (median of rounds; spread), {config.stash[SIZES_KEY]}")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> Sizes:
    """Sizes for this machine."""
    return request.config.stash[SIZES_KEY]


@pytest.fixture(scope="session")
def quick(sizes: Sizes) -> bool:
    """Whether --quick was given."""
    return sizes.name == "quick"


@pytest.fixture
def duel(benchmark: BenchmarkFixture, sizes: Sizes) -> Duel:
    """Compares, times and registers contestants."""
    return Duel(benchmark, sizes.device, sizes.rounds)
