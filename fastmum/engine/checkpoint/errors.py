"""What can be wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written; the message is one line for the user."""


class UnreadableError(CheckpointError):
    """A checkpoint that is damaged: the one before may do."""


def reason(error: BaseException) -> str:
    """Why something failed, in a few words."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
