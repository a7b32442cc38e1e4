"""Sequences without files: what the sampler reads of manifests."""

import numpy as np


class Catalogue:
    """Data sets by name, each a list of sequence lengths."""

    def __init__(self, **datasets):
        lengths = np.concatenate([np.asarray(v, np.int64) for v in datasets.values()])
        self.datasets = tuple(datasets)
        self.starts = np.concatenate([[0], lengths.cumsum()])
        self.dataset_of = np.repeat(np.arange(len(datasets)), [len(v) for v in datasets.values()]).astype(np.int16)

    def sequence_of(self, rows):
        return np.searchsorted(self.starts, rows, side="right") - 1
