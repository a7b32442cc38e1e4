"""A process that begins from nothing and makes training steps: how soon, and in how much memory.

`python -m benchmarks.fresh SIDE`, with the sizes as JSON on standard input; prints what it saw as JSON. The reference's
side imports no fastmum: its imports are part of what is measured.
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

from benchmarks.results import FASTMUM, REFERENCE

ROOT = Path(__file__).resolve().parents[1]


def measure(side: str, sizes: object, steps: int) -> dict[str, float]:
    """Start the process and wait for it.

    Args:
        side: `REFERENCE` or `FASTMUM`.
        sizes: a `benchmarks.sizes.Sizes`.
        steps: to make.

    Returns:
        "seconds" until the end of the first step, "peak_bytes" of all steps (CUDA: most that torch had allocated; CPU:
        most that was resident), "loss" of the first step.
    """
    question = {
        "model": sizes.model.__dict__, "settings": sizes.settings, "frames": sizes.frames, "views": sizes.views,
        "image_size": sizes.image_size, "precision": sizes.precision, "device": sizes.device.type, "steps": steps,
    }  # fmt: skip
    began = perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fresh", side], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        process.stdin.write(json.dumps(question))
        process.stdin.close()
        loss = process.stdout.readline()
        seconds = perf_counter() - began
        peak = process.stdout.readline()
    if process.returncode or not peak:
        raise RuntimeError(f"the process of {side} has ended with {process.returncode}; its words are above")
    return {"seconds": seconds, "loss": json.loads(loss), "peak_bytes": json.loads(peak)}


def _reference(sizes: dict) -> Callable[[], float]:
    import torch

    from benchmarks.reference.model import ReferenceMuM
    from benchmarks.reference.step import build_optimizer, train_step

    torch.manual_seed(0)
    device, model = torch.device(sizes["device"]), sizes["model"]
    with device:
        net = ReferenceMuM(**model)
    optimizer = build_optimizer(net, 1e-4)
    frames, side = sizes["frames"], sizes["image_size"]
    shape = frames // sizes["views"], sizes["views"], 3, side, side
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    noise = torch.rand(frames, (side // net.patch_size) ** 2).to(device)
    return lambda: train_step(net, optimizer, images, noise, precision=sizes["precision"])[0]


def _fastmum(sizes: dict) -> Callable[[], float]:
    from benchmarks.step import fastmum_steps, make_problem

    settings = [*sizes["settings"], *([] if sizes["device"] == "cuda" else ["model.compile=off"])]
    frames, views = sizes["frames"], sizes["views"]
    problem = make_problem(frames, views, settings)
    return fastmum_steps(problem, [(views,) * (frames // views)])[0]


def _peak_resident() -> int:
    """Bytes. Linux's `ru_maxrss` would be no less than that of the process which started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(dict(line.split(":") for line in status.read_text().splitlines())["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """The process that is measured."""
    sizes = json.load(sys.stdin)
    step = {REFERENCE: _reference, FASTMUM: _fastmum}[sys.argv[1]](sizes)
    print(json.dumps(step()), flush=True)
    for _ in range(sizes["steps"] - 1):
        step()
    import torch

    peak = torch.cuda.max_memory_allocated() if sizes["device"] == "cuda" else _peak_resident()
    print(json.dumps(peak), flush=True)
    os._exit(0)  # what Python takes to tear down is nobody's start-up


if __name__ == "__main__":
    main()
