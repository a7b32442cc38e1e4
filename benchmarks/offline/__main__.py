"""Predict the cost of a training step on a GPU, without one, for fastmum and for the reference.

    python -m benchmarks.offline --gpu a100 --frames 96

Nothing is timed: operations, bytes and launches are counted in what PyTorch and Inductor would launch, times are the
roofline of every kernel, max(operations / (0.7 peak), bytes / (0.85 bandwidth), 3 us), and all of it is a prediction.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Sequence

VIEWS = 12  # frames of a sequence in the record


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline",
        description=__doc__.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", choices=("a100", "h100", "h200"), default="a100", help="the GPU (a100)")
    parser.add_argument("--frames", type=int, default=96, help="frames of a step (96)")
    parser.add_argument(
        "--views", type=int, help=f"frames of a sequence (the largest divisor of --frames up to {VIEWS})"
    )
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
        choices=("fastmum", "fastmum_block", "reference", "reference_compiled"),
        help="cost this one only; repeatable (all but fastmum_block, which is --compile block whatever that says)",
    )
    parser.add_argument(
        "--record", action="store_true", help="write the figures of all GPUs to the record of the tests"
    )
    parser.add_argument(
        "--updates", action="store_true", help="only the update of the weights, by AdamW and by Muon, on every GPU"
    )
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of the table")
    args = parser.parse_args(argv)
    if args.record and args != parser.parse_args(["--record"]):
        return _refuse("--record takes no other option: it records the default step on every GPU")
    if args.views is None:
        args.views = max(views for views in range(1, VIEWS + 1) if args.frames % views == 0)
    if min(args.frames, args.views) < 1 or args.frames % args.views:
        return _refuse(f"--frames is {args.frames}, but must be a positive multiple of --views, which is {args.views}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return _refuse("TRITON_INTERPRET is set, but kernels are compiled here: unset it")
    if importlib.util.find_spec("triton") is None:
        return _refuse("Triton is not installed, but compiles the kernels here: pip install triton, on Linux")

    import torch

    if torch.version.cuda is None:
        return _refuse(
            f"torch {torch.__version__} is built without CUDA, and cannot lower for it: install a build that has it, "
            "which needs no GPU, such as those of https://download.pytorch.org/whl/cu130"
        )

    # Slow to import, and after the check of the environment: Triton reads it once.
    from benchmarks.offline import report, updates
    from benchmarks.offline.gpus import GPUS
    from benchmarks.offline.steps import Batch
    from fastmum.model.config import PRESETS

    if args.model not in PRESETS:
        return _refuse(f"--model is '{args.model}', but must be one of {', '.join(PRESETS)}")
    logging.disable(logging.WARNING)  # of compilers that miss a GPU
    if args.updates:
        with contextlib.redirect_stdout(sys.stderr):
            lines = updates.table(PRESETS[args.model], GPUS)
        print(lines)
        return 0
    found, sides = {}, args.side or (*report.SIDES, *([report.BLOCKS] * args.record))
    for name in GPUS if args.record else [args.gpu]:
        with contextlib.redirect_stdout(sys.stderr):  # of compilers that print
            costs = report.measure(
                PRESETS[args.model], Batch(args.frames, args.views), GPUS[name], args.compile, args.recompute,
                sides,
            )  # fmt: skip
        found[name] = {side: cost.summary(GPUS[name]) for side, cost in costs.items()}
    settings = {key: getattr(args, key) for key in ("model", "frames", "views", "compile", "recompute")}
    if args.record:
        report.record(found)
    elif args.json:
        header = {"what": "predictions by formula, nothing measured", "gpu": GPUS[args.gpu].name}
        print(json.dumps(header | settings | found[args.gpu]))
    else:
        title = ", ".join(f"{key} {value}" for key, value in settings.items())
        print(report.table(found[args.gpu], GPUS[args.gpu], title))
    return 0


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
