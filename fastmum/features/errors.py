"""What can go wrong with features."""

from __future__ import annotations


class FeaturesError(RuntimeError):
    """Features that cannot be had or written; the message is one line for the user."""
