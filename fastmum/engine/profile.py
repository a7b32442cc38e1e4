"""Profiles a window of training steps with `torch.profiler`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fastmum.files import atomic_path

log = logging.getLogger(__name__)


class StepProfiler:
    """Context manager around the training loop, which has done `start` steps; call `step` after every step.

    After the window (steps counted from 1) or the loop it writes `steps_<first>-<last>_rank_<rank>.json.gz`, a Chrome
    trace for ui.perfetto.dev with ranges `ProfilerStep#<step>`, and `.txt`, a table by self time. If that fails, it
    warns.
    """

    def __init__(self, window: range, folder: Path, device: torch.device, start: int = 0, rank: int = 0) -> None:
        self._window, self._folder, self._rank, self._start, self._done = window, folder, rank, start, start
        self._profile: profile | None = None
        self._cuda = device.type == "cuda"

    def __enter__(self) -> Self:
        if self._start >= self._window[-1]:
            self._warn(f"the run resumes at step {self._start + 1}")
            return self
        # The step before the window warms up: the first events of a trace are slow.
        steps = schedule(skip_first=self._window[0] - 1, wait=0, warmup=1, active=len(self._window), repeat=1)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profile = profile(activities=activities, schedule=steps, on_trace_ready=self._write)
        self._attempt(self._profile.start)
        if self._profile:
            self._profile.step_num = self._start
            self._attempt(self._profile.step)
        return self

    def step(self, done: int) -> None:
        """Call after every step; `done` is the number of steps done."""
        self._done = done
        if self._profile:
            self._attempt(self._profile.step)
            if done >= self._window[-1]:
                self._stop()

    def __exit__(self, *_: object) -> None:
        if self._profile and self._done < self._window[0]:
            self._warn(f"training ended after step {self._done}")
        self._stop()

    def _stop(self) -> None:
        if self._profile:
            self._attempt(self._profile.stop)
        self._profile = None

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except RuntimeError as error:
            log.warning("no profile: %s", str(error).splitlines()[0])
            self._profile = None

    def _warn(self, reason: str) -> None:
        steps = _span(self._window[0], self._window[-1])
        log.warning("profile.steps is %s, but %s: nothing is profiled", steps, reason)

    def _write(self, recorded: profile) -> None:
        first = max(self._window[0], self._start + 1)
        if self._done < first:
            return  # the loop ended before the window
        path = self._folder / f"steps_{_span(first, self._done)}_rank_{self._rank}.json.gz"
        table = path.with_name(path.name.replace(".json.gz", ".txt"))
        by = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            rows = recorded.key_averages().table(sort_by=by, row_limit=100, max_name_column_width=80)
            table.write_text(rows + "\n", encoding="utf-8")
            with atomic_path(path) as partial:
                recorded.export_chrome_trace(str(partial))
        except OSError as error:
            log.warning("no profile in %s: %s", self._folder, error.strerror)
        else:
            log.info("profile of steps %s: %s and %s", _span(first, self._done), path, table.name)


def _span(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else f"{first}"
