"""Time and memory to open and read manifests of 20 M frames (a quarter of them without a GPU)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.large_manifests import write_large_manifests
from fastmum.data.manifest import Manifests

# MB before and after opening: resident, private (not mapped files), peak.
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc, from which memory is read")
def test_open(benchmark, paths):
    out = subprocess.run([sys.executable, "-c", MEMORY, *paths], check=True, capture_output=True, text=True).stdout
    frames, before, after = json.loads(out)
    benchmark.extra_info["frames"] = frames
    benchmark.extra_info["MB resident, private, peak"] = {"before": before, "after": after}
    benchmark.pedantic(lambda: Manifests(paths), rounds=5)


def test_files(benchmark, paths):
    """Paths of 96 random frames."""
    manifests, rng = Manifests(paths), np.random.default_rng(0)
    benchmark(lambda: manifests.files(rng.integers(0, manifests.num_frames, 96)))
