"""What can be wrong with weights."""

from __future__ import annotations

from collections.abc import Sequence

from fastmum.engine.checkpoint import CheckpointError

NAMED = 10  # keys listed in a message


class WeightsError(CheckpointError):
    """Weights that cannot be used, of a checkpoint or otherwise; the message is one line for the user."""


class MismatchError(WeightsError):
    """A state dict that does not fit the model.

    Args:
        where: what was read, and what it was compared with.
        missing, extra: keys, with the shape expected of those that are missing.
        misshapen: keys with their shape and the one expected.
    """

    def __init__(self, where: str, missing: Sequence[str], extra: Sequence[str], misshapen: Sequence[str]) -> None:
        self.missing, self.extra, self.misshapen = list(missing), list(extra), list(misshapen)
        findings = [("lacks", missing), ("has besides", extra), ("has in other shapes", misshapen)]
        super().__init__(f"{where}: it {'; '.join(f'{what} {some(keys)}' for what, keys in findings if keys)}")


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
