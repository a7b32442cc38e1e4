"""Time to the first training step of a fresh process, and peak memory.

`python -m benchmarks.fresh SIDE` reads the sizes as JSON from standard input and prints results as JSON. The side of
the reference does not import fastmum, because imports are part of the measurement.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.results import FASTMUM, REFERENCE

ROOT = Path(__file__).resolve().parents[1]


def measure(side: str, sizes: Any, steps: int) -> dict[str, float]:
    """Run a fresh process.

    Args:
        side: `REFERENCE` or `FASTMUM`.
        sizes: `benchmarks.sizes.Sizes`.
        steps: number of training steps.

    Returns:
        "seconds" to the end of the first step, "loss" of that step, "peak_bytes" of all steps (CUDA: allocated by
        torch; CPU: resident).
    """
    problem = {
        "model": sizes.model.__dict__, "settings": sizes.settings, "frames": sizes.frames, "views": sizes.views,
        "image_size": sizes.image_size, "precision": sizes.precision, "device": sizes.device.type, "steps": steps,
    }  # fmt: skip
    began = perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fresh", side], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(problem))
        process.stdin.close()
        loss = process.stdout.readline()
        seconds = perf_counter() - began
        peak = process.stdout.readline()
    if process.returncode or not peak:
        raise RuntimeError(f"the process of {side} exited with {process.returncode}; its output is above")
    return {"seconds": seconds, "loss": json.loads(loss), "peak_bytes": json.loads(peak)}


def _reference(sizes: dict[str, Any]) -> Callable[[], float]:
    import torch

    from benchmarks.reference.model import ReferenceMuM
    from benchmarks.reference.step import build_optimizer, train_step

    torch.manual_seed(0)
    device = torch.device(sizes["device"])
    with device:
        net = ReferenceMuM(**sizes["model"])
    optimizer = build_optimizer(net, 1e-4)
    frames, side = sizes["frames"], sizes["image_size"]
    shape = frames // sizes["views"], sizes["views"], 3, side, side
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    noise = torch.rand(frames, (side // net.patch_size) ** 2).to(device)
    return lambda: train_step(net, optimizer, images, noise, precision=sizes["precision"])[0]


def _fastmum(sizes: dict[str, Any]) -> Callable[[], float]:
    from benchmarks.step import build_fastmum

    settings = [*sizes["settings"], *([] if sizes["device"] == "cuda" else ["model.compile=off"])]
    return build_fastmum(sizes["frames"], sizes["views"], settings)


def _peak_resident() -> int:
    """Bytes. Linux's `ru_maxrss` is never below that of the parent process."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(dict(line.split(":") for line in status.read_text().splitlines())["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """The measured process."""
    sizes = json.load(sys.stdin)
    step = {REFERENCE: _reference, FASTMUM: _fastmum}[sys.argv[1]](sizes)
    print(json.dumps(step()), flush=True)
    for _ in range(sizes["steps"] - 1):
        step()
    import torch

    peak = torch.cuda.max_memory_allocated() if sizes["device"] == "cuda" else _peak_resident()
    print(json.dumps(peak), flush=True)
    os._exit(0)  # without Python's teardown


if __name__ == "__main__":
    main()
