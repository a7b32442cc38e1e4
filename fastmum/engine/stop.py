"""Stopping a run without losing work: a signal ends the current step on all ranks, then the run saves.

SLURM sends SIGUSR1 (`#SBATCH --signal=USR1@180`) or SIGTERM before it takes the nodes away. The run then exits with
`REQUEUE`, and `launch/slurm.sh` queues the job again. The command imports this module first, and torch only later.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from fastmum.engine.distributed import DistContext

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: temporary failure, try again later
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
GRACE = 5.0  # seconds in which the main thread can end by itself


class Stopped(SystemExit):
    """A signal ends this process at once, with its exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(exit_code(number))
        self.name = signal.Signals(number).name


def exit_on_signals() -> None:
    """From now on, and until `StopRequest.begin`, the first of `SIGNALS` raises `Stopped`; for the main thread only.

    If the process still runs after `GRACE` seconds, because C++ code waits for another process or compiles, a thread
    ends it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    told = threading.Event()

    def tell(number: int) -> None:
        if not told.is_set():
            told.set()
            line = f"{signal.Signals(number).name}: the run ends at once; the same command continues it\n"
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(2, line.encode())

    def stop(number: int, frame: FrameType | None) -> None:
        _handle(signal.SIG_IGN)
        tell(number)
        raise Stopped(number)

    def watch() -> None:
        while received := os.read(reader, 1):
            if received[0] in SIGNALS:
                time.sleep(GRACE)
                tell(received[0])
                os._exit(exit_code(received[0]))
        os.close(reader)

    def forget() -> None:  # forked processes share the pipe
        if signal.set_wakeup_fd(-1) == writer:
            _handle(signal.SIG_DFL)

    os.register_at_fork(after_in_child=forget)
    threading.Thread(target=watch, daemon=True).start()
    _handle(stop)


class StopRequest:
    """Context manager that records the first of `SIGNALS` in `signal`; a second SIGINT acts at once, as usual.

    Signals are recorded from `begin` on: before the first step of a process there is nothing to save. Repeated SIGTERM
    and SIGUSR1 are ignored: launchers signal all processes twice.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def begin(self) -> None:
        """Record signals from now on; does nothing if called again."""
        if not self._handlers:
            self._handlers = _handle(self._record)
            if (pipe := signal.set_wakeup_fd(-1)) >= 0:
                os.close(pipe)  # ends the thread of `exit_on_signals`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])


class StopConsensus:
    """Non-blocking MAX all-reduce of the stop flag over gloo: every rank learns one step later about any signal."""

    def __init__(self, world: "DistContext") -> None:
        self._group = world.control
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def largest(self, number: int) -> int:
        """Start the all-reduce of this step's flag and return the maximum of the previous step's, at first 0."""
        if self._group is None:
            return number
        import torch
        import torch.distributed as dist

        result = self.finish()
        flag = torch.tensor(number)
        self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag
        return result

    def finish(self) -> int:
        """Wait for the pending all-reduce and return its maximum, 0 if none is pending."""
        if self._pending is None:
            return 0
        (work, flag), self._pending = self._pending, None
        work.wait()
        return int(flag)


def _handle(handler: Callable | signal.Handlers) -> dict[signal.Signals, Any]:
    """Set the handler of `SIGNALS` and return the previous ones; SIGHUP stays ignored (`nohup`)."""
    numbers = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def exit_code(number: int) -> int:
    """Exit code after a signal: `REQUEUE`, or 130 after Ctrl-C."""
    return 128 + number if number == signal.SIGINT else REQUEUE
