"""Evaluations of what an encoder knows about correspondence: docs/evaluation.md.

`evaluate_matching` trains linear probes for dense matching, `evaluate_cosine` matches features as they are,
`evaluate_attention` reads matches off the decoder's attention; `evaluate_views` measures what other views do for the
masked loss. `open_pairs` and `open_sequences` open what they are measured on; `python -m fastmum.evaluate --help` does
it all from the command line.
"""

from fastmum.evaluate.attention import attention_maps, evaluate_attention
from fastmum.evaluate.cosine import evaluate_cosine
from fastmum.evaluate.matching import evaluate_matching
from fastmum.evaluate.pairs import Frame, Pair, PairSet, open_pairs
from fastmum.evaluate.probe import ProbeSettings
from fastmum.evaluate.result import Result
from fastmum.evaluate.sequences import SequenceSet, ViewSequence, open_sequences
from fastmum.evaluate.views import ViewSettings, evaluate_views

__all__ = [
    "Frame",
    "Pair",
    "PairSet",
    "ProbeSettings",
    "Result",
    "SequenceSet",
    "ViewSequence",
    "ViewSettings",
    "attention_maps",
    "evaluate_attention",
    "evaluate_cosine",
    "evaluate_matching",
    "evaluate_views",
    "open_pairs",
    "open_sequences",
]
