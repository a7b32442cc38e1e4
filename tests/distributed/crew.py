"""Processes that train together."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

from processes import Pool

PATIENCE = 120  # seconds that a run may take

# The smallest model; a step has 24 frames in four micro-batches.
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


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Environment variables of torchrun; none for a single process."""
    if size == 1:
        return {}
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


class Crew(Pool):
    """Jobs are runs."""

    def __init__(self) -> None:
        super().__init__(PATIENCE, _places)

    def train(self, size: int, words: Sequence[str]) -> list[int | str]:
        """Results of `train` in `size` processes, or the error."""
        return self.run(size, _train, free_port(), list(words))


def _places(rank: int) -> dict[int, tuple[int, int]]:
    return {size: (rank, size) for size in (1, 2, 4)}


def run_main(rank: int, size: int, port: int, words: list[str], errors: str) -> None:
    """The command line in a separate process, its output in a file."""
    stream = open(errors, "w", buffering=1)  # noqa: SIM115 (until the process ends)
    os.dup2(stream.fileno(), 2)
    os.dup2(stream.fileno(), 1)
    sys.stderr = sys.stdout = stream
    os.environ |= environment(rank, size, port)
    from fastmum import tasks
    from fastmum.train import main

    tasks.TASKS["tiny"] = "tiny_task:TinyTask"
    os._exit(main(words))


def _train(place: tuple[int, int], port: int, words: list[str]) -> int | str:
    import torch.distributed as dist
    from tiny_task import TinyTask

    from fastmum.config import load_config
    from fastmum.tasks import find_task
    from fastmum.train import train

    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ |= environment(*place, port)
    try:
        task = TinyTask if "run.task=tiny" in words else find_task("mum")
        return train(load_config(None, words, task.Config), task)
    except ValueError as error:  # of configuration or data
        return f"{type(error).__name__}: {error}"
    finally:
        if dist.is_initialized():  # the run failed; the process goes on to the next
            dist.destroy_process_group()
