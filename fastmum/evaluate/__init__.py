"""Evaluations of correspondence across views: docs/evaluation.md.

`open_pairs` and `open_sequences` open the data. `python -m fastmum.evaluate --help` is the command.
"""

from fastmum.evaluate.attention import attention_maps, evaluate_attention
from fastmum.evaluate.matching import ProbeSettings, Result, evaluate_cosine, evaluate_discriminant, evaluate_matching
from fastmum.evaluate.pairs import Frame, Pair, PairSet, open_pairs
from fastmum.evaluate.views import SequenceSet, ViewSequence, ViewSettings, evaluate_views, open_sequences

__all__ = [
    "Frame", "Pair", "PairSet", "ProbeSettings", "Result", "SequenceSet", "ViewSequence", "ViewSettings",
    "attention_maps", "evaluate_attention", "evaluate_cosine", "evaluate_discriminant", "evaluate_matching",
    "evaluate_views", "open_pairs", "open_sequences",
]  # fmt: skip
