"""Timed training steps, in this process or in a separate one."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PROFILED_OPERATORS = 25

Lap = Callable[[str], None]
Mark = Any  # seconds of the host's clock, or torch.cuda.Event


class Clock:
    """Times work on a device: with the host's clock on a CPU, with events in the current stream on CUDA."""

    def __init__(self, device: torch.device | str) -> None:
        self._on_cuda = torch.device(device).type == "cuda"

    def mark(self) -> Mark:
        """A point in time, without a synchronisation."""
        if not self._on_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Synchronise with the device."""
        if self._on_cuda:
            torch.cuda.synchronize()

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Seconds between two marks; on CUDA after `wait`."""
        return begin.elapsed_time(end) / 1e3 if self._on_cuda else end - begin


class Contestant:
    """A training step and its times.

    Args:
        name: in tables.
        step: does a step, calls its argument with the name of every phase that ends, returns the loss.
        device: of the step.

    Attributes:
        step: as given.
        rounds: seconds of every phase and of the whole "step", one dictionary per call.
    """

    def __init__(self, name: str, step: Callable[[Lap], float], device: torch.device | str = "cpu") -> None:
        self.name, self.rounds = name, list[dict[str, float]]()
        self.step, self._clock, self._device = step, Clock(device), torch.device(device)

    def __call__(self) -> float:
        """Time a step; returns the loss."""
        clock, ends = self._clock, dict[str, Mark]()
        clock.wait()
        last = began = clock.mark()

        def lap(phase: str) -> None:
            ends[phase] = clock.mark()

        loss = self.step(lap)
        end = clock.mark()
        clock.wait()
        times = {"step": clock.seconds(began, end)}
        for phase, mark in ends.items():
            times[phase], last = clock.seconds(last, mark), mark
        self.rounds.append(times)
        return loss

    def milliseconds(self, statistic: Callable[[list[float]], float]) -> dict[str, float]:
        """A statistic over the rounds, of every phase and of the whole step."""
        return {phase: 1e3 * statistic([times[phase] for times in self.rounds]) for phase in self.rounds[0]}

    def profile(self) -> str:
        """Operators of one more step by self time."""
        on_cuda = self._device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
            self()
        self.rounds.pop()  # slowed by the profiler
        by = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        return f"{self.name}\n{profiler.key_averages().table(sort_by=by, row_limit=PROFILED_OPERATORS)}"

    def close(self) -> None:
        """Release the contestant's memory and process."""


class RemoteContestant(Contestant):
    """A contestant in a separate process, so that contestants do not share an allocator.

    Args:
        build: module-level function that makes the contestant in that process.
        args: its arguments.
    """

    def __init__(self, build: Callable[..., Contestant], *args: object) -> None:
        context = get_context("spawn")
        self._connection, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, build, args), daemon=True)
        self._process.start()
        remote.close()
        self.name, self.rounds = self._request("name"), []

    def __call__(self) -> float:
        loss, times = self._request("step")
        self.rounds.append(times)
        return loss

    def profile(self) -> str:
        return self._request("profile")

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()

    def _request(self, what: str) -> Any:
        self._connection.send(what)
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError("the process of a contestant has died; its output is above") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, build: Callable[..., Contestant], args: tuple[Any, ...]) -> None:
    try:
        contestant = build(*args)
    except Exception as error:
        connection.recv()
        connection.send(error)
        return
    while True:
        try:
            what = connection.recv()
        except EOFError:
            return
        if what == "step":
            connection.send((contestant(), contestant.rounds[-1]))
        else:
            connection.send(contestant.profile() if what == "profile" else contestant.name)
