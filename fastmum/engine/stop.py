"""Stopping a run from outside without losing work: a signal ends the current step, then the run saves.

SLURM sends SIGUSR1 (`#SBATCH --signal=USR1@180`) or SIGTERM before it takes the machines away; such a run exits with
`REQUEUE`, by which `launch/slurm.sh` knows that it is to be started again.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: not an error, try again later
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, remembers the first of `SIGNALS`; a second SIGINT acts as usual, at once.

    Others are taken as often as they come: launchers send theirs to all processes, and then once more.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])


def exit_code(number: int) -> int:
    """What a run returns that a signal has ended: `REQUEUE`, or 130 after Ctrl-C, which asks for no other start."""
    return 128 + number if number == signal.SIGINT else REQUEUE
