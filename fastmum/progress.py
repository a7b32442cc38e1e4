"""Progress of long work on stderr: a bar on a terminal, a line a minute in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 60.0
REPORT_EVERY_S = 1.0
_report: Callable[[], object] | None = None
_reported = 0.0  # when `_report` was called


@contextlib.contextmanager
def reported(report: Callable[[], object]) -> Iterator[None]:
    """Call a function while bars inside the block advance, every `REPORT_EVERY_S`."""
    global _report, _reported
    before, _report, _reported = _report, report, time.monotonic()
    try:
        yield
    finally:
        _report = before


class _Bar(tqdm):
    def __iter__(self) -> Iterator[Any]:
        for each in super().__iter__():
            yield each
            self._advanced()

    def update(self, n: float | None = 1) -> bool | None:
        self._advanced()
        return super().update(n)

    def _advanced(self) -> None:
        global _reported
        if _report and time.monotonic() - _reported >= REPORT_EVERY_S:
            _report()
            _reported = time.monotonic()


class _Log:
    """The file that tqdm writes to where stderr is no terminal: whole lines, without carriage returns."""

    def write(self, text: str) -> None:
        if text := text.strip():
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> tqdm:
    """A bar of tqdm with its `options`; in a log a line every `LINE_EVERY_S`, so none for short work."""
    if not on_terminal():
        options |= {"file": _Log(), "delay": LINE_EVERY_S, "mininterval": LINE_EVERY_S, "miniters": 1}
    return _Bar(iterable, disable=not show, dynamic_ncols=True, **options)
