"""Measure the queueing of a step, in a process that has the no-op device (`benchmarks.host.no_op_cuda`).

Milliseconds are of this process's CPU, so that others on the machine matter less; counts do not depend on the machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.contestant import Contestant
from benchmarks.duel import no_collection
from benchmarks.host import no_op_cuda
from benchmarks.step import PHASES, fastmum_steps, make_problem

WARM_UP = 3  # steps: the first compiles, the second builds tables
Step = Callable[[Callable[[str], None]], object]


def device_counts(frames: int, settings: Sequence[str], lengths: Sequence[tuple[int, ...]]) -> list[dict[str, int]]:
    """What each of some steps asks of the device, from the first one on; `lengths` are those of its sequences."""
    contestants = _contestants(frames, lengths[0][0], settings, lengths)
    found, before = [], no_op_cuda.counts()
    for contestant in contestants:
        contestant.step(lambda phase: None)
        after = no_op_cuda.counts()
        found.append({name: after[name] - before[name] for name in after})
        before = after
    return found


def _contestants(
    frames: int, views: int, settings: Sequence[str], lengths: Sequence[tuple[int, ...]]
) -> list[Contestant]:
    with mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor):  # nothing is computed
        problem = make_problem(frames, views, settings)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its library talks to a driver in other ways
    return fastmum_steps(problem, lengths)


def measure(frames: int, views: int, settings: Sequence[str], rounds: int) -> dict[str, Any]:
    """Milliseconds by phase, the least of the rounds, and the counts of one step.

    Counts: `bytecodes` of Python, `calls` of Python and C functions by Python, `operators` of PyTorch, `launches` of
    kernels, and what else was asked of the device.
    """
    (contestant,) = _contestants(frames, views, settings, [(views,) * (frames // views)])
    for _ in range(WARM_UP):
        contestant.step(lambda phase: None)
    return {"ms": _milliseconds(contestant.step, rounds)} | count(contestant.step)


def _milliseconds(step: Step, rounds: int) -> dict[str, float]:
    found: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "step")}
    with no_collection():
        for _ in range(rounds):
            ends = [time.process_time()]

            def lap(phase: str, ends: list[float] = ends) -> None:
                now = time.process_time()
                found[phase].append(now - ends[-1])
                ends.append(now)

            step(lap)
            found["step"].append(ends[-1] - ends[0])
    return {phase: round(1e3 * min(times), 2) for phase, times in found.items()}


def count(step: Step) -> dict[str, int]:
    """What a step executes; the backward pass runs in the calling thread, where Python can be traced."""
    before = no_op_cuda.counts()
    step(lambda phase: None)
    device = {name: n - before[name] for name, n in no_op_cuda.counts().items()}
    with torch.autograd.set_multithreading_enabled(False):
        step(lambda phase: None)
        with _counted_calls() as calls:
            step(lambda phase: None)
        with _counted_bytecodes() as bytecodes:
            step(lambda phase: None)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(lambda phase: None)
    operators = sum(event.name.partition("::")[0] in ("aten", "fastmum") for event in profiler.events())
    return {"bytecodes": bytecodes[0], "calls": calls[0], "operators": operators} | device


@contextmanager
def _counted_calls() -> Iterator[list[int]]:
    counted = [0]

    def note(frame: FrameType, event: str, arg: object) -> None:
        counted[0] += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        yield counted
    finally:
        sys.setprofile(None)


@contextmanager
def _counted_bytecodes() -> Iterator[list[int]]:
    counted = [0]

    def inside(frame: FrameType, event: str, arg: object) -> Callable:
        counted[0] += event == "opcode"
        return inside

    def enter(frame: FrameType, event: str, arg: object) -> Callable:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return inside

    sys.settrace(enter)
    try:
        yield counted
    finally:
        sys.settrace(None)
