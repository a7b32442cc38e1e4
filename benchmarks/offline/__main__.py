"""Predict what a training step costs on a GPU, without one, for fastmum and for the reference.

    python -m benchmarks.offline --gpu a100 --frames 96

Nothing is timed: operations, bytes and launches are counted in what PyTorch and Inductor would launch, times are the
roofline of every kernel, max(operations / (0.7 peak), bytes / (0.85 bandwidth), 3 us), and all of it is a prediction.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline",
        description=__doc__.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", choices=("a100", "h100", "h200"), default="a100", help="the GPU (a100)")
    parser.add_argument("--frames", type=int, default=96, help="frames of a step (96)")
    parser.add_argument("--views", type=int, default=12, help="frames of a sequence (12)")
    parser.add_argument("--model", default="mum_vitl16", help="preset of the model (mum_vitl16)")
    parser.add_argument(
        "--compile", choices=("full", "block"), default="full", help="what fastmum compiles, as model.compile (full)"
    )
    parser.add_argument(
        "--recompute",
        choices=("mlp", "none"),
        default="mlp",
        help="what fastmum computes again in the backward pass, as model.recompute (mlp, its choice on CUDA)",
    )
    parser.add_argument(
        "--side",
        action="append",
        choices=("fastmum", "reference", "reference_compiled"),
        help="cost this one only; repeatable (all three)",
    )
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of the table")
    args = parser.parse_args(argv)
    if min(args.frames, args.views) < 1 or args.frames % args.views:
        return _refuse(f"--frames is {args.frames}, but must be a positive multiple of --views, which is {args.views}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return _refuse("TRITON_INTERPRET is set, but kernels are compiled here: unset it")

    # Slow to import, and after the check of the environment: Triton reads it once.
    from benchmarks.offline import report
    from benchmarks.offline.gpus import GPUS
    from benchmarks.offline.steps import Batch
    from fastmum.model.config import PRESETS

    if args.model not in PRESETS:
        return _refuse(f"--model is '{args.model}', but must be one of {', '.join(PRESETS)}")
    gpu, batch = GPUS[args.gpu], Batch(args.frames, args.views)
    logging.disable(logging.WARNING)  # of compilers that miss a GPU
    with contextlib.redirect_stdout(sys.stderr):  # and of those that print
        costs = report.measure(PRESETS[args.model], batch, gpu, args.compile, args.recompute, args.side or report.SIDES)
    summaries = {side: cost.summary(gpu) for side, cost in costs.items()}
    if args.json:
        header = {"what": "predictions by formula, nothing measured", "gpu": gpu.name, "model": args.model}
        print(
            json.dumps(
                header
                | {"frames": args.frames, "views": args.views, "compile": args.compile, "recompute": args.recompute}
                | summaries
            )
        )
    else:
        print(
            report.table(
                summaries,
                gpu,
                f"{args.model}, {args.frames} frames, compile={args.compile}, recompute={args.recompute}",
            )
        )
    return 0


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
