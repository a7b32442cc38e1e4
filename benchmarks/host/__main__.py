"""Host time to queue one training step, without a GPU: its kernels are no-ops, everything before them is real.

    python -m benchmarks.host --compile block

Prints CPU milliseconds by part of the step, and counts that do not depend on the machine. A real driver takes 2 to
3 us more for every launch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.host.no_op_cuda import build, environment
from fastmum.errors import run_command
from fastmum.files import write_atomic

RECORD = Path(__file__).with_name("record.json")  # limits of the tests
RECORDED = ("bytecodes", "calls", "operators", "launches", "copies")
MODES = ("block", "full")
FRAMES, VIEWS = 96, 12


def on_no_op_device(function: str, *args: Any, arch: int = 80) -> Any:
    """The result of a function of `benchmarks.host.measure` in a process that has the no-op device; all is JSON."""
    code = f"import json, sys; from benchmarks.host.measure import {function} as function; "
    code += "print(json.dumps(function(*json.loads(sys.argv[1]))))"
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-c", code, json.dumps(args)], env=environment(build(Path(folder)), arch), check=False,
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"error: the measuring process ended with {result.returncode}; its output is above")
    return json.loads(result.stdout.splitlines()[-1])


def measured(mode: str, frames: int, views: int, settings: Sequence[str], rounds: int, arch: int = 80) -> dict:
    """The result of `measure` for `model.compile=mode`."""
    return on_no_op_device("measure", frames, views, [f"model.compile={mode}", *settings], rounds, arch=arch)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Times and counts by what is compiled."""
    rows = [f"{'':28}" + "".join(f"{'compile=' + mode:>15}" for mode in found)]
    for phase in next(iter(found.values()))["ms"]:
        rows.append(f"{phase + ', CPU ms':28}" + "".join(f"{one['ms'][phase]:15.1f}" for one in found.values()))
    for name in (name for name in next(iter(found.values())) if name != "ms"):
        rows.append(f"{name.replace('_', ' '):28}" + "".join(f"{one[name]:15,}" for one in found.values()))
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"frames of a step ({FRAMES})")
    parser.add_argument("--views", type=int, default=VIEWS, help=f"frames of a sequence ({VIEWS}); divides the frames")
    parser.add_argument("--compile", action="append", choices=(*MODES, "off"), help="as model.compile (block and full)")
    parser.add_argument("--arch", type=int, default=80, choices=(80, 90), help="compute capability (80)")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps, of which the least counts (20)")
    parser.add_argument("--record", action="store_true", help="write the counts to the record of the tests")
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of the table")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="a setting, as in training")
    args = parser.parse_intermixed_args(argv)
    if min(args.frames, args.views, args.rounds) < 1 or args.frames % args.views:
        parser.error("--frames must be a positive multiple of --views, and --rounds at least 1")

    def command() -> None:
        modes = args.compile or MODES
        found = {mode: measured(mode, args.frames, args.views, args.settings, args.rounds, args.arch) for mode in modes}
        if args.record:
            kept = {mode: {name: one[name] for name in RECORDED} for mode, one in found.items()}
            versions = {"python": ".".join(map(str, sys.version_info[:2])), "torch": metadata.version("torch")}
            write_atomic(RECORD, json.dumps(versions | kept, indent=2) + "\n")
        print(json.dumps(found) if args.json else table(found))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
