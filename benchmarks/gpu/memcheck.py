"""compute-sanitizer's memcheck on the kernels that gather and scatter: accesses outside of tensors.

Odd sizes, so that every tile has a ragged end. With the further word "inside" it only runs the kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import torch

from benchmarks.gpu.measure import this_device
from benchmarks.gpu.record import Record, stage_main
from benchmarks.gpu.stages import ROOT
from benchmarks.reference.step import IMAGENET_MEAN, IMAGENET_STD
from fastmum.kernels import gather_patches, gather_tokens, patch_loss, scatter_tokens

TOOL = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
INSIDE = "inside"
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
FRAMES, GRID, VISIBLE, PATCH, WIDTH = 3, 5, 7, 16, 37


def run_kernels() -> None:
    """Forward and backward pass of the kernels that move tokens and patches."""
    device, generator = this_device(), torch.Generator().manual_seed(0)
    ids = torch.rand(FRAMES, GRID * GRID, generator=generator).argsort(1).to(device)
    visible, masked = ids[:, :VISIBLE].contiguous(), ids[:, VISIBLE:].contiguous()
    side = GRID * PATCH
    frames = torch.randint(0, 256, (FRAMES, side, side, 3), generator=generator, dtype=torch.uint8).to(device)
    pixels = IMAGENET_MEAN, IMAGENET_STD, PATCH
    for dtype in (torch.float32, torch.bfloat16):
        gather_patches(frames, visible, *pixels, dtype)
        pred = torch.randn(*masked.shape, 3 * PATCH**2, generator=generator).to(device, dtype)
        patch_loss(pred.requires_grad_(), frames, masked, *pixels).backward()
        tokens = torch.randn(FRAMES, 1 + VISIBLE, WIDTH, generator=generator).to(device, dtype)
        mask = torch.randn(WIDTH, generator=generator).to(device)
        whole = scatter_tokens(tokens.requires_grad_(), mask.requires_grad_(), visible, GRID * GRID)
        gather_tokens(whole, masked).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(record: Record, small: bool, words: list[str]) -> bool:
    """Run the tool on this program; False if it found an error."""
    if INSIDE in words:
        run_kernels()
        return True
    inside = [sys.executable, "-m", "benchmarks.gpu.memcheck", INSIDE, "--out", str(record.file.with_suffix(".inside"))]
    environment = os.environ | {"FASTMUM_KERNELS": "triton"}  # on a CPU, too
    done = subprocess.run([*TOOL, *inside], cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    found = SUMMARY.search(done.stdout + done.stderr)
    errors = int(found[1]) if found else None
    record.headline = f"{errors} errors" if found else f"compute-sanitizer ended with code {done.returncode}"
    return done.returncode == 0 and errors == 0


if __name__ == "__main__":
    sys.exit(stage_main(__doc__, measure))
