"""Says on what the numbers were measured."""

import platform
import subprocess
from pathlib import Path

import torch


def pytest_report_header() -> list[str]:
    """Machine, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return [
        f"machine: {platform.machine()} {platform.system()}, {device} ({torch.backends.cpu.get_cpu_capability()})",
        f"versions: torch {torch.__version__}, Python {platform.python_version()}; commit {commit or 'unknown'}",
    ]
