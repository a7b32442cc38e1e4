"""Something that is timed step by step, in this process or in one of its own."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter

from torch.profiler import ProfilerActivity, profile

PROFILED_OPERATORS = 25

Lap = Callable[[str], None]


class Contestant:
    """A training step and its times.

    Args:
        name: in the table.
        step: does a step, calls its argument with the name of every phase that ends, returns the loss.
    """

    def __init__(self, name: str, step: Callable[[Lap], float]) -> None:
        self.name = name
        self.rounds: list[dict[str, float]] = []  # seconds of every phase and of the "step"
        self._step = step

    def __call__(self) -> float:
        """Do a step and keep its times; returns the loss."""
        times: dict[str, float] = {}
        began = last = perf_counter()

        def lap(phase: str) -> None:
            nonlocal last
            now = perf_counter()
            times[phase] = now - last
            last = now

        loss = self._step(lap)
        self.rounds.append(times | {"step": perf_counter() - began})
        return loss

    def milliseconds(self, statistic: Callable[[list[float]], float]) -> dict[str, float]:
        """The statistic over the rounds, of every phase that the step has and of the whole step."""
        return {phase: 1e3 * statistic([times[phase] for times in self.rounds]) for phase in self.rounds[0]}

    def profile(self) -> str:
        """The operators of one more step, by the time that they themselves took."""
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self()
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=PROFILED_OPERATORS)
        return f"{self.name}\n{table}"


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
