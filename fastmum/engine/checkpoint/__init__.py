"""Checkpoints: written in the background, published atomically, verified when read, resharded on load.

A checkpoint is a folder with the files of `torch.distributed.checkpoint` and a manifest, `checkpoint.json`. It holds
one flat state, names -> tensors, of all ranks.
"""

from fastmum.engine.checkpoint.manifest import CheckpointError, find_checkpoints, set_aside_after
from fastmum.engine.checkpoint.shards import load_checkpoint, load_newest, read_weights
from fastmum.engine.checkpoint.writer import Checkpoints

__all__ = [
    "CheckpointError", "Checkpoints", "find_checkpoints", "load_checkpoint", "load_newest", "read_weights",
    "set_aside_after",
]  # fmt: skip
