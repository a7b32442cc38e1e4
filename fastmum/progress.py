"""Progress of long work on stderr: a bar on a terminal, a line a minute in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 60.0


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
    return tqdm(iterable, disable=not show, dynamic_ncols=True, **options)
