"""Checkpoints: written in the background, whole or not there, verified when read, resharded freely.

A checkpoint is a folder with the files of `torch.distributed.checkpoint` and a manifest, `checkpoint.json`. It holds a
flat state: names -> tensors, of all ranks together.
"""

from fastmum.engine.checkpoint.about import About, State
from fastmum.engine.checkpoint.errors import CheckpointError
from fastmum.engine.checkpoint.folder import Found, find_checkpoints, set_aside_after
from fastmum.engine.checkpoint.reader import Weights, load_checkpoint, load_newest, read_weights
from fastmum.engine.checkpoint.writer import Checkpoints

__all__ = [
    "About",
    "CheckpointError",
    "Checkpoints",
    "Found",
    "State",
    "Weights",
    "find_checkpoints",
    "load_checkpoint",
    "load_newest",
    "read_weights",
    "set_aside_after",
]
