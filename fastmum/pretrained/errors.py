"""Errors of weights."""

from __future__ import annotations

from collections.abc import Sequence

from fastmum.errors import FastmumError

MAX_NAMES = 10  # keys listed in a message


class WeightsError(FastmumError):
    """Weights that cannot be used."""


class MismatchError(WeightsError):
    """A state dict that does not fit the model.

    Args:
        where: what was read, and what it was compared with.
        missing, extra: keys; missing ones with the expected shape.
        misshapen: keys with their shape and the expected one.
    """

    def __init__(self, where: str, missing: Sequence[str], extra: Sequence[str], misshapen: Sequence[str]) -> None:
        self.missing, self.extra, self.misshapen = list(missing), list(extra), list(misshapen)
        findings = [("missing", missing), ("unexpected", extra), ("of another shape", misshapen)]
        super().__init__(f"{where}: {'; '.join(f'{what} {some(keys)}' for what, keys in findings if keys)}")


def some(names: Sequence[str]) -> str:
    """The first few names, and the number of the others."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
