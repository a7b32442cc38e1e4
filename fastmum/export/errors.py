"""What can go wrong with an export."""

from __future__ import annotations


class ExportError(RuntimeError):
    """An export that cannot be done; the message is one line for the user."""
