"""What the results depend on, as JSON on stdout: the GPU, versions, the commit. Fails if CUDA does not work."""

from __future__ import annotations

import json
import platform
import subprocess

import torch

from benchmarks.gpu.stages import ROOT


def describe_machine() -> dict[str, str]:
    """GPU (or CPU), driver, versions and commit."""
    cuda = torch.cuda.is_available()
    name, driver = f"CPU, {torch.get_num_threads()} threads", ""
    if cuda:
        torch.ones(1, device="cuda").sum().item()  # fails here rather than in the stages
        name, driver = (
            torch.cuda.get_device_name(),
            _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        )
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    return {
        "gpu": name,
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability()) if cuda else "",
        "driver": driver.splitlines()[0] if driver else "",
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
        f"Triton {triton}, Python {platform.python_version()}",
        "commit": _output("git", "describe", "--always", "--dirty") or "unknown",
    }


def _output(*words: str) -> str:
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    print(json.dumps({"cuda": torch.cuda.is_available()} | describe_machine()))
