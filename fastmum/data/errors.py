"""The error of everything that a user can put right in the data."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be trained on; the message is one line for the user."""
