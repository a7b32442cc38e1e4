"""Fresh processes: time to the end of the first training step, peak memory, and time of imports."""

import subprocess
import sys
from time import perf_counter

from benchmarks.duel import Duel, rotated
from benchmarks.fresh import ROOT, measure
from benchmarks.results import FASTMUM, REFERENCE
from benchmarks.sizes import Sizes

STEPS = 2  # moments exist in the second
INITIAL_LOSS = (0.9, 1.5)  # of an untrained model: targets have variance 1
IMPORTS = {REFERENCE: "import benchmarks.reference.step", FASTMUM: "import fastmum; fastmum.MuM"}


def test_start_up_and_memory(duel: Duel, sizes: Sizes, quick: bool) -> None:
    sides = REFERENCE, FASTMUM
    seen = {side: [] for side in sides}
    for number in range(1 if quick else 2):
        for side in rotated(sides, number):
            seen[side].append(measure(side, sizes, STEPS))
    for side, runs in seen.items():
        for run in runs:
            low, high = INITIAL_LOSS
            assert low < run["loss"] < high, f"{side}: the first loss is {run['loss']}"
    seconds, peaks = ({side: [run[key] for run in seen[side]] for side in sides} for key in ("seconds", "peak_bytes"))
    duel.record("start-up", "fresh process to the end of the first step", seconds)
    kind = "allocated by torch" if sizes.device.type == "cuda" else "resident"
    duel.record("peak memory", f"{STEPS} training steps, {kind}", peaks, unit="bytes", seconds=seconds)


def test_import(duel: Duel, quick: bool) -> None:
    """The reference imports PyTorch and little else."""
    times = {side: [] for side in IMPORTS}
    for number in range(0 if quick else -1, 1 if quick else 4):
        for side in rotated(list(IMPORTS), max(number, 0)):
            began = perf_counter()
            subprocess.run([sys.executable, "-c", IMPORTS[side]], check=True, cwd=ROOT)
            if number >= 0:  # the first fills the page cache
                times[side].append(perf_counter() - began)
    duel.record("start-up", "import and exit", times)
