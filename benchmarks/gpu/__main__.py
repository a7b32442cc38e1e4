"""The first hour on a GPU: `python -m benchmarks.gpu [--minutes 10]`, from a checkout, without a network.

Runs stages, each in a separate process with a time limit, and writes results.json and a page after every one. A second
call goes on with the stages that are not done. This process imports the standard library only and never uses the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu.results import DONE, FAILED, INTERRUPTED, RUNNING, SKIPPED, TIMED_OUT, Results, ResultsError
from benchmarks.gpu.stages import PACKAGES, ROOT, STAGES, Stage, missing_packages

LEAST_S = 20.0  # that a stage needs to begin
CPU_FACTOR = 5  # of the time limits, which are those of a GPU
POLL_S = 0.25
GRACE_S = 10.0  # between the interrupt and the kill of a stage
MACHINE_S = 120.0  # to import torch and start CUDA
WIDTH = 110  # of the line of progress


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 if a stage failed, 2 for an error, 130 if interrupted."""
    args = parse(argv)
    began = time.monotonic()
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        machine = find_machine() | {"small": args.small}
        if not machine["cuda"] and not args.small:
            raise ResultsError("torch sees no CUDA device: --small runs every stage on the CPU, at tiny sizes")
        results = Results(args.out.resolve(), machine)
        results.write()
        if missing := missing_packages(list(PACKAGES)):
            print(f"missing packages, whose stages are skipped: {' '.join(missing)} (pip install them; wheels do)")
        failed = run_all(select(args, results), results, began + 60 * args.minutes)
    except (ResultsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is written; the same command goes on", file=sys.stderr)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"{results.page}\n{results.file}")
    if failed:
        print(f"error: failed: {', '.join(failed)}; their output is in {results.folder}/<stage>.log", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments; ends the program if they are invalid."""
    stages = "\n".join(f"  {stage.name:10} {stage.title}, at most {stage.seconds} s" for stage in STAGES.values())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0],
        epilog=f"stages, in their order:\n{stages}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="for all stages together (%(default)g)")
    add("--only", type=lambda text: text.split(","), metavar="A,B", help="these stages")
    add("--again", action="store_true", help="also those that are done")
    add("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="for results, page and logs (%(default)s)")
    add("--small", action="store_true", help="tiny sizes, on a CPU too: to see that everything works")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.only or () if name not in STAGES]:
        parser.error(f"--only names '{unknown[0]}', but the stages are {', '.join(STAGES)}")
    return args


def find_machine() -> dict[str, Any]:
    """`benchmarks.gpu.machine` in a process; ResultsError if torch or CUDA does not work."""
    words = [sys.executable, "-m", "benchmarks.gpu.machine"]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=MACHINE_S)
    except subprocess.TimeoutExpired:
        raise ResultsError(f"torch and CUDA did not start within {MACHINE_S:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ResultsError(f"torch or CUDA does not work here: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def select(args: argparse.Namespace, results: Results) -> list[Stage]:
    """The stages to run: those that never ran before those that did not end well."""
    named = [stage for stage in STAGES.values() if not args.only or stage.name in args.only]
    due = [stage for stage in named if args.again or results.state(stage.name) != DONE]
    return sorted(due, key=lambda stage: results.state(stage.name) is not None)


def run_all(stages: Sequence[Stage], results: Results, deadline: float) -> list[str]:
    """Run the stages while there is time; names of those that did not end well."""
    failed = []
    for number, stage in enumerate(stages, 1):
        place = f"[{number}/{len(stages)}] {stage.name}"
        if reason := stage.why_not():
            results.set(stage.name, SKIPPED, reason=reason)
            print(f"{place}: skipped: {reason}", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < min(LEAST_S, stage.seconds):
            print(f"{place}: no time left; the same command goes on with it", flush=True)
            continue
        limit = stage.seconds * (1 if results.machine["cuda"] else CPU_FACTOR)
        state, seconds = run_stage(stage, results, min(limit, left), place)
        entry = results.stages[stage.name]
        text = "; ".join(part for part in (entry["headline"], entry["reason"]) if part)
        print(f"{_clear()}{place}: {state} in {seconds:.0f} s: {text}", flush=True)
        failed += [stage.name] if state != DONE else []
    return failed


def run_stage(stage: Stage, results: Results, limit: float, place: str) -> tuple[str, float]:
    """Run a stage for at most `limit` seconds; its state and seconds. The results are written as they change."""
    name, cuda = stage.name, results.machine["cuda"]
    findings, log, began = results.findings(name), results.log(name), time.monotonic()
    findings.unlink(missing_ok=True)
    words = [sys.executable, "-m", f"benchmarks.gpu.{stage.module}", *stage.words, "--out", str(findings)]
    words += ["--small"] if results.machine["small"] else []
    words += stage.cuda_only if cuda else stage.cpu_only
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONUNBUFFERED": "1"} | dict(stage.environment) | ({} if cuda else {"TRITON_INTERPRET": "1"})
    results.set(name, RUNNING)
    changed = findings.stat().st_mtime_ns if findings.exists() else 0
    if not sys.stdout.isatty():
        print(f"{place}: at most {limit:.0f} s", flush=True)

    def look() -> None:
        nonlocal changed
        seconds = time.monotonic() - began
        if sys.stdout.isatty():
            print(f"{_clear()}{place}: {seconds:.0f} of {limit:.0f} s  {_last_line(log)}"[:WIDTH], end="", flush=True)
        if findings.exists() and (latest := findings.stat().st_mtime_ns) != changed:
            changed = latest
            results.set(name, RUNNING, seconds)

    state, reason = INTERRUPTED, ""
    try:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            code = _wait(process, began + limit, look)
        finally:
            _stop(process)
        if code is None:
            state, reason = TIMED_OUT, f"stopped after {limit:.0f} s"
        else:
            state, reason = (DONE, "") if code == 0 else (FAILED, f"exit code {code}: {_last_line(log)}")
    finally:
        seconds = time.monotonic() - began
        results.set(name, state, seconds, reason)
    return state, seconds


def _wait(process: subprocess.Popen, deadline: float, look: Callable[[], None]) -> int | None:
    """The exit code, or None at the deadline."""
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(POLL_S)
        look()
    return None


def _stop(process: subprocess.Popen) -> None:
    """End the processes of a stage: by an interrupt, on which pytest writes its results, then by force."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)  # also what it left behind
    process.wait()


def _last_line(file: Path) -> str:
    """The last line of a log that is not empty."""
    with contextlib.suppress(OSError):
        with open(file, "rb") as log:
            log.seek(max(0, os.path.getsize(file) - 4096))
            lines = log.read().decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


def _clear() -> str:
    return "\r\033[K" if sys.stdout.isatty() else ""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
