"""Chunks of numbered frames."""

from __future__ import annotations

# "We find that a chunk size of 100 frames usually works fine" (supplement, "Data sequences").
CHUNK = 100


def cut_into_chunks(num_frames: int, size: int = CHUNK, last_takes_rest: bool = False) -> list[range]:
    """Consecutive ranges that cover 0 .. num_frames - 1; none for 0 frames.

    The frames that do not fill a chunk are a shorter one, or with `last_takes_rest` (the released scripts) belong to
    the last one, which then has up to 2 size - 1 frames.
    """
    count = max(1, num_frames // size) if last_takes_rest else -(-num_frames // size)
    ends = [i * size for i in range(1, count)] + [num_frames]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False) if start < end]
