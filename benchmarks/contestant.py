"""Something that is timed step by step, in this process or in one of its own."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.clock import Clock

PROFILED_OPERATORS = 25

Lap = Callable[[str], None]


class Contestant:
    """A training step and its times.

    Args:
        name: in the table.
        step: does a step, calls its argument with the name of every phase that ends, returns the loss.
        device: that does the work.
    """

    def __init__(self, name: str, step: Callable[[Lap], float], device: torch.device | str = "cpu") -> None:
        self.name = name
        self._clock, self._device = Clock(device), torch.device(device)
        self.rounds: list[dict[str, float]] = []  # seconds of every phase and of the "step"
        self._step = step

    def __call__(self) -> float:
        """Do a step and keep its times; returns the loss."""
        clock = self._clock
        clock.wait()
        began = clock.mark()
        ends = {}

        def lap(phase: str) -> None:
            ends[phase] = clock.mark()

        loss = self._step(lap)
        ends["step"] = clock.mark()
        clock.wait()
        times, last = {"step": clock.seconds(began, ends.pop("step"))}, began
        for phase, end in ends.items():
            times[phase], last = clock.seconds(last, end), end
        self.rounds.append(times)
        return loss

    def milliseconds(self, statistic: Callable[[list[float]], float]) -> dict[str, float]:
        """The statistic over the rounds, of every phase that the step has and of the whole step."""
        return {phase: 1e3 * statistic([times[phase] for times in self.rounds]) for phase in self.rounds[0]}

    def profile(self) -> str:
        """The operators of one more step, by the time that they themselves took."""
        on_cuda = self._device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
            self()
        self.rounds.pop()  # a slow one
        by = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=PROFILED_OPERATORS)
        return f"{self.name}\n{table}"

    def close(self) -> None:
        """Nothing is left to end."""


class Apart(Contestant):
    """A contestant in a process of its own, where nothing that another does to the allocator helps or hurts it.

    Args:
        build: makes the contestant there; a function of a module.
        args: its arguments.
    """

    def __init__(self, build: Callable[..., Contestant], *args: object) -> None:
        context = get_context("spawn")
        self._there, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, build, args), daemon=True)
        self._process.start()
        there.close()
        self.name = self._ask("name")
        self.rounds = []

    def __call__(self) -> float:
        loss, times = self._ask("step")
        self.rounds.append(times)
        return loss

    def profile(self) -> str:
        return self._ask("profile")

    def close(self) -> None:
        """End the process."""
        self._there.close()
        self._process.join(timeout=10)
        self._process.kill()

    def _ask(self, what: str) -> object:
        self._there.send(what)
        try:
            answer = self._there.recv()
        except EOFError:
            raise RuntimeError("the process of a contestant has died; its words are above") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, build: Callable[..., Contestant], args: tuple) -> None:
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
