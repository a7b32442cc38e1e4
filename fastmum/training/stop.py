"""Stopping a run from outside without losing work: Ctrl-C and SIGTERM end the current step, then the run saves."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopRequest:
    """While entered, remembers the first SIGINT or SIGTERM; a second one acts as usual, at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
