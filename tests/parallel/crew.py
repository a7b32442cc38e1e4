"""Processes that train together, started once and used by many tests: importing torch takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Sequence

SIZE = 4
PATIENCE = 120  # seconds that a run may take

# Processes are forked from one that has imported everything, and has no threads yet.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["fastmum.train"])

# A run of the smallest model there is; a step has 24 frames, in four parts.
SMALL = [
    "model.preset=mum_tiny", "model.embed_dim=32", "model.depth=1", "model.num_heads=2", "model.decoder_embed_dim=32",
    "model.decoder_depth=2", "model.decoder_num_heads=2", "data.image_size=32", "data.views=[2,3]",
    "data.frames_per_batch=6", "data.frames_per_step=24", "data.held_out=0.3", "optim.base_lr=0.01",
    "optim.warmup_steps=2", "train.steps=20", "train.log_every=1", "train.checkpoint_every=10", "train.eval_every=10",
    "train.eval_batches=3", "train.picture_every=20", "train.threads=1", "train.precision=fp32",
]  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Crew:
    """Four processes, of which the first 1, 2 or 4 do a run."""

    def __init__(self) -> None:
        self._pipes, self.processes = [], []
        for rank in range(SIZE):
            ours, theirs = FORKSERVER.Pipe()
            process = FORKSERVER.Process(target=_work, args=(rank, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self.processes.append(process)

    def train(self, size: int, words: Sequence[str]) -> list[int | str]:
        """What `train` returned in each process, or the error's words."""
        port = free_port()
        for pipe in self._pipes[:size]:
            pipe.send((size, port, list(words)))
        outcomes = []
        for rank, pipe in enumerate(self._pipes[:size]):
            assert pipe.poll(PATIENCE), f"rank {rank} hangs"
            outcomes.append(pipe.recv())
        return outcomes

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _work(rank: int, pipe: multiprocessing.connection.Connection) -> None:
    import torch

    from fastmum.config import load_config
    from fastmum.train import train

    torch.set_num_threads(1)
    while True:
        size, port, words = pipe.recv()
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        if size > 1:
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        try:
            pipe.send(train(load_config(None, words)))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
