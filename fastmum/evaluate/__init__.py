"""Evaluations of correspondence across views, and of depth: docs/evaluation.md.

`open_pairs`, `open_sequences` and `open_depth` open the data. `python -m fastmum.evaluate --help` is the command.
"""

from fastmum.evaluate.attention import attention_maps, evaluate_attention
from fastmum.evaluate.depth import DepthSettings, evaluate_depth
from fastmum.evaluate.depth_sets import open_depth
from fastmum.evaluate.matching import ProbeSettings, Result, evaluate_cosine, evaluate_discriminant, evaluate_matching
from fastmum.evaluate.pairs import Frame, Pair, PairSet, open_pairs
from fastmum.evaluate.views import SequenceSet, ViewSequence, ViewSettings, evaluate_views, open_sequences

__all__ = [
    "DepthSettings", "Frame", "Pair", "PairSet", "ProbeSettings", "Result", "SequenceSet", "ViewSequence",
    "ViewSettings", "attention_maps", "evaluate_attention", "evaluate_cosine", "evaluate_depth",
    "evaluate_discriminant", "evaluate_matching", "evaluate_views", "open_depth", "open_pairs", "open_sequences",
]  # fmt: skip
