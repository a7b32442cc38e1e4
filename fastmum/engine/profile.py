"""A close look at a few steps: what ran when, on the CPU and the GPU."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

log = logging.getLogger(__name__)

ROWS = 100  # of the table
NAME_WIDTH = 80  # of its first column


class StepProfiler:
    """Profiles the steps of a window, as a context around the loop that is told of every step.

    When the window ends, or the loop does, it writes `steps_<first>-<last>_rank_<rank>.json.gz`, a Chrome trace for
    chrome://tracing or ui.perfetto.dev, and `.txt` beside it, a table by self time. Steps outside of the window cost a
    comparison. A failure to profile or to write is a warning: training goes on.

    Args:
        window: steps to profile, counted from 1 (`ProfileSection.window`); empty: none.
        folder: for the files.
        device: that trains.
        start: steps done before the loop; of a window that they reach into, the rest is profiled.
        rank: of this process.
    """

    def __init__(self, window: range, folder: Path, device: torch.device, start: int = 0, rank: int = 0) -> None:
        self._window, self._folder, self._rank, self._done = window, folder, rank, start
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None
        self._first: int | None = None  # step of the trace; None while none is recorded
        self._label: record_function | None = None
        self._over = not window

    def __enter__(self) -> StepProfiler:
        if self._window and self._done >= self._window[-1]:
            log.warning(
                "profile.steps is %s, but the run goes on at step %d: nothing is profiled",
                _span(self._window[0], self._window[-1]),
                self._done + 1,
            )
            self._over = True
        self._prepare_for_next()
        return self

    def step(self, done: int) -> None:
        """Say that a step has ended.

        Args:
            done: steps done.
        """
        self._done = done
        if self._over:
            return
        if done >= self._window[-1]:
            self._finish()
        else:
            self._prepare_for_next()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._over:
            return
        if self._done < self._window[0]:
            log.warning(
                "profile.steps is %s, but training ended after step %d: nothing was profiled",
                _span(self._window[0], self._window[-1]),
                self._done,
            )
        self._finish()

    def _prepare_for_next(self) -> None:
        coming = self._done + 1
        if self._over or coming < self._window[0] - 1:
            return
        if self._profile is None:
            # A step ahead where there is one: the first events after this are slow.
            self._attempt(self._prepare)
        if self._profile is not None and coming >= self._window[0]:
            if self._first is None:
                self._attempt(self._profile.start_trace)
                self._first = coming
            self._relabel(None if self._over else f"training step {coming}")

    def _prepare(self) -> None:
        self._profile = profile(activities=self._activities)
        self._profile.prepare_trace()

    def _relabel(self, name: str | None) -> None:
        if self._label is not None:
            self._label.__exit__(None, None, None)
        self._label = record_function(name) if name else None
        if self._label is not None:
            self._label.__enter__()

    def _finish(self) -> None:
        self._over = True
        self._relabel(None)
        if self._profile is None:
            return
        if self._first is None:
            self._attempt(self._profile.start_trace)  # a trace that was prepared ends no other way
        self._attempt(self._profile.stop_trace)
        if self._profile is not None and self._first is not None and self._first <= self._done:
            self._write(self._profile, _span(self._first, self._done))
        self._profile = None

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except RuntimeError as error:
            log.warning("no profile: %s", str(error).splitlines()[0])
            self._profile, self._over = None, True

    def _write(self, recorded: profile, span: str) -> None:
        path = self._folder / f"steps_{span}_rank_{self._rank}.json.gz"
        table = path.with_name(path.name.replace(".json.gz", ".txt"))
        partial = path.with_name("partial_" + path.name)
        by = "self_cuda_time_total" if ProfilerActivity.CUDA in self._activities else "self_cpu_time_total"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            rows = recorded.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=NAME_WIDTH)
            table.write_text(rows + "\n", encoding="utf-8")
            recorded.export_chrome_trace(str(partial))
            os.replace(partial, path)
        except OSError as error:
            log.warning("no profile in %s: %s", self._folder, error.strerror)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        else:
            log.info("profile of steps %s: %s and %s", span, path, table.name)


def _span(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else f"{first}"
