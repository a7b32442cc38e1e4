"""Which sequences are held out from training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def held_out(names: Sequence[str], share: float) -> np.ndarray:
    """Indices of the held-out names, ascending: at least one if `share` > 0 and there are two or more.

    The choice depends on each name alone, so that adding sequences does not reshuffle the others.
    """
    count = min(len(names) - 1, max(1, round(share * len(names)))) if share > 0 and names else 0
    by_hash = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    return np.sort(np.array(by_hash[:count], np.int64))
