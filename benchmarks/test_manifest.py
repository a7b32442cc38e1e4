"""Opening and reading manifests of 20 M frames, of a quarter without a GPU: time and memory of a process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.large_manifests import write_large_manifests
from fastmum.data.manifest import Manifests

# Before and after opening, in MB: resident, of it private (not of mapped files), and the peak.
MEMORY = """
import json, sys
from fastmum.data.manifest import Manifests
def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(lines[key].split()[0]) / 1e3 for key in ("VmRSS", "RssAnon", "VmHWM")]
before = memory()
manifests = Manifests(sys.argv[1:])
print(json.dumps([manifests.num_frames, before, memory()]))
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory, quick, sizes):
    share = 0.02 if quick else 0.25 if sizes.device.type == "cpu" else 1.0
    return write_large_manifests(tmp_path_factory.mktemp("manifests"), share)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory of a process is read from /proc, which is not here"
)
def test_open(benchmark, paths):
    out = subprocess.run([sys.executable, "-c", MEMORY, *paths], check=True, capture_output=True, text=True).stdout
    frames, before, after = json.loads(out)
    benchmark.extra_info["frames"] = frames
    benchmark.extra_info["MB resident, private, peak"] = {"before": before, "after": after}
    benchmark.pedantic(lambda: Manifests(paths), rounds=5)


def test_files(benchmark, paths):
    """The paths of a batch of 96 frames from all over."""
    manifests, rng = Manifests(paths), np.random.default_rng(0)
    benchmark(lambda: manifests.files(rng.integers(0, manifests.num_frames, 96)))
