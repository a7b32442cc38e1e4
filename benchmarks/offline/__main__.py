"""Predict the cost of a training step on a GPU, without one, for fastmum and for the reference.

    python -m benchmarks.offline --gpu h100 --recorded

Nothing is timed: operations, bytes and launches are counted in what PyTorch and Inductor would launch. Times follow
from the shares of the peak and of the bandwidth that kernels of a class reach in public measurements, or in yours
(--efficiency). They are ranges, and all of it is a prediction.
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
from pathlib import Path

from benchmarks.offline import report
from benchmarks.offline.efficiency import Range, efficiencies
from benchmarks.offline.gpus import GPUS
from benchmarks.offline.kernel import Cost
from benchmarks.offline.pricing import Assumptions
from benchmarks.projection import write_page
from fastmum.errors import run_command

VIEWS = report.STEP["views"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    default = parser.parse_args([])
    chosen = {key for key, value in vars(args).items() if value != getattr(default, key)}
    for mode, other in (("record", {"side"}), ("page", set())):
        if getattr(args, mode) and chosen - other - {mode}:
            return _refuse(f"--{mode} takes no other option: it is of the default step on every GPU")
    if args.recorded and chosen & {*report.STEP, "updates"}:
        return _refuse("--recorded is of the default step: leave out the options of another one")
    if args.host_ms and not 0 <= args.host_ms[0] <= args.host_ms[1] <= args.host_ms[2]:
        return _refuse("--host-ms must have LOW <= LIKELY <= HIGH, and none below 0")
    if args.views is None:
        args.views = max(views for views in range(1, VIEWS + 1) if args.frames % views == 0)
    if min(args.frames, args.views) < 1 or args.frames % args.views:
        return _refuse(f"--frames is {args.frames}, but must be a positive multiple of --views, which is {args.views}")
    if not (args.recorded or args.page) and (why := _why_not()):
        return _refuse(why)
    return run_command(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline",
        description=__doc__.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gpu", choices=GPUS, default="a100", help="the GPU (a100)")
    add("--frames", type=int, default=96, help="frames of a step (96)")
    add("--views", type=int, help=f"frames of a sequence (the largest divisor of --frames up to {VIEWS})")
    add("--model", default="mum_vitl16", help="preset of the model (mum_vitl16)")
    add("--compile", choices=("full", "block"), default="full", help="what fastmum compiles, as model.compile (full)")
    add(
        "--recompute",
        choices=("mlp", "none"),
        default="mlp",
        help="what fastmum computes again in the backward pass, as model.recompute (mlp, its choice on CUDA)",
    )
    add(
        "--side",
        action="append",
        choices=(*report.SIDES, report.BLOCKS),
        help="this one only; repeatable (all but fastmum_block, which is --compile block whatever that says)",
    )
    add(
        "--attention",
        choices=("fa2", "fa3", "cudnn"),
        default="fa2",
        help="kernel of fastmum's attention across frames (fa2, which comes with torch)",
    )
    add("--tma", action="store_true", help="price fastmum's products as if they used tensor descriptors")
    add("--cuda-graphs", action="store_true", help="with padded segments, as under train.cuda_graphs")
    add("--host-ms", type=float, nargs=3, metavar=("LOW", "LIKELY", "HIGH"), help="to queue a step of fastmum")
    add("--efficiency", type=Path, metavar="FILE", help="measurements, see benchmarks.offline.efficiency")
    add("--recorded", action="store_true", help="price what is recorded: seconds instead of minutes")
    add("--record", action="store_true", help="lower the default step (or a --side of it) for all GPUs, and record it")
    add("--page", action="store_true", help="write docs/predictions.md from the record")
    add("--updates", action="store_true", help="updates of the weights by AdamW and by Muon, and steps, on every GPU")
    add("--json", action="store_true", help="JSON on standard output instead of the table")
    return parser


def _why_not() -> str | None:
    """Why nothing can be lowered here, with the remedy."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, but kernels are compiled here: unset it"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, but compiles the kernels here: pip install triton, on Linux"

    import torch

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA, and cannot lower for it: install a build that has it, "
            "which needs no GPU, such as those of https://download.pytorch.org/whl/cu130"
        )
    return None


def _run(args: argparse.Namespace) -> None:
    if args.record:
        sides = args.side or (*report.SIDES, report.BLOCKS)
        report.record({arch: _lower(args, gpu, sides) for arch, gpu in report.LOWERED.items()})
    elif args.page:
        write_page([report.predictions(gpu) for gpu in GPUS])
    elif args.updates:
        _updates(args)
    else:
        table = efficiencies(args.gpu, args.efficiency)
        assumptions = Assumptions(GPUS[args.gpu], table, args.attention, args.tma, args.cuda_graphs)
        host = Range(*args.host_ms).scaled(1e-3) if args.host_ms else None
        arch = GPUS[args.gpu].arch
        costs = report.recorded(arch) if args.recorded else _lower(args, args.gpu, args.side)
        found = report.summary({side: costs[side] for side in args.side or costs}, assumptions, host)
        step = {key: getattr(args, key) for key in report.STEP}
        if args.json:
            print(json.dumps(report.header(assumptions, found) | step | found))
        else:
            print(report.table(found, assumptions, ", ".join(f"{key} {value}" for key, value in step.items())))


def _updates(args: argparse.Namespace) -> None:
    from benchmarks.offline import updates
    from fastmum.model.config import PRESETS

    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):
        lines = updates.table(PRESETS[args.model], GPUS)
    print(lines)


def _lower(args: argparse.Namespace, gpu: str, sides: Sequence[str] | None) -> dict[str, Cost]:
    # Slow to import, and after the check of the environment: Triton reads it once.
    from benchmarks.offline.steps import Batch, measure
    from fastmum.config import ConfigError
    from fastmum.model.config import PRESETS

    if args.model not in PRESETS:
        raise ConfigError(f"--model is '{args.model}', but must be one of {', '.join(PRESETS)}")
    logging.disable(logging.WARNING)  # of compilers that miss a GPU
    with contextlib.redirect_stdout(sys.stderr):  # of compilers that print
        batch = Batch(args.frames, args.views)
        return measure(PRESETS[args.model], batch, GPUS[gpu], args.compile, args.recompute, sides or report.SIDES)


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
