"""Where spans begin and end in a packed batch, in a form whose shape never changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Spans of queries and, beside each, the span of keys that it sees.

    Args:
        cu_q, cu_k: (n + 1,) int32, where spans of queries and of keys begin and end: 0, L_0, L_0 + L_1, ..., T. Spans
            may be empty: a batch of few sequences is padded with them, so that the number of entries stays the same.
        max_q, max_k: no span is longer. A bound that holds for all batches, rather than the longest span of
            this one, keeps compiled code valid for all of them.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of_frames(cls, lengths: Tensor | Sequence[int], num_frames: int, queries: int, keys: int, views: int) -> Spans:
        """Spans of sequences, in tokens.

        Args:
            lengths: (n,) frames of each sequence, on the CPU.
            num_frames: F, of all sequences together. The result has F + 1 entries, whatever n is.
            queries, keys: tokens of a frame that ask, and that are seen.
            views: no sequence has more frames.
        """
        lengths = torch.as_tensor(lengths)
        cu_frames = torch.full((num_frames + 1,), num_frames, dtype=torch.int32)
        cu_frames[0] = 0
        cu_frames[1 : len(lengths) + 1] = lengths.cumsum(0)
        return cls(cu_frames * queries, cu_frames * keys, views * queries, views * keys)

    def to(self, device: torch.device) -> Spans:
        """The same on a device; the copy to a GPU does not wait for it, the copy from one must: it is read at once."""
        wait = device.type == "cpu"
        cu_q, cu_k = (x.to(device, torch.int32, non_blocking=not wait) for x in (self.cu_q, self.cu_k))
        return Spans(cu_q, cu_k, self.max_q, self.max_k)
