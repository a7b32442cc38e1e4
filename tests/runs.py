"""Small training runs, in this process or in several."""

from __future__ import annotations

import math
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastmum import tasks
from fastmum.config.load import load_config, peek_task
from fastmum.engine.checkpoint import read_weights
from fastmum.engine.rundir import read_metrics
from fastmum.train import main, train

tasks.TASKS["tiny"] = "tiny_task:TinyTask"

SMALL = [
    "model.preset=mum_tiny", "model.embed_dim=32", "model.depth=1", "model.num_heads=2", "model.decoder_embed_dim=32",
    "model.decoder_depth=2", "model.decoder_num_heads=2", "data.image_size=32", "data.views=[2,3]",
    "data.frames_per_batch=6", "data.held_out=0.3", "optim.base_lr=0.01", "optim.warmup_steps=2",
    "train.steps=8", "train.log_every=1", "train.checkpoint_every=3", "train.eval_every=4", "train.eval_batches=1",
    "train.picture_every=4", "train.threads=1",
]  # fmt: skip


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without those that depend on the machine."""
    kept = ("step", "loss", "held_out_loss", "grad_norm", "lr", "mae")
    records = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in r.items() if name.split("/")[0].startswith(kept)} for r in records]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def set_environment(rank: int, size: int, port: int) -> None:
    """Set the variables of torchrun; a single process has none."""
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip


def run_main(rank: int, size: int, port: int, args: list[str], log: Path) -> None:
    """The command line in a separate process, with its output in a file."""
    stream = open(log, "w", buffering=1)  # noqa: SIM115 (until the process ends)
    os.dup2(stream.fileno(), 2)
    os.dup2(stream.fileno(), 1)
    sys.stderr = sys.stdout = stream
    set_environment(rank, size, port)
    os._exit(main(args))


def ranks_by_size(rank: int) -> dict[int, tuple[int, int]]:
    return {size: (rank, size) for size in (1, 2, 3, 4)}


def run_train(rank_and_size: tuple[int, int], port: int, args: list[str]) -> int:
    """`train` in a process of a pool."""
    set_environment(*rank_and_size, port)
    try:
        return train(load_config(None, args, tasks.find_task(peek_task(None, args)).Config))
    finally:
        if dist.is_initialized():  # the run failed; the process continues with the next
            dist.destroy_process_group()


def run_with_nan(rank_and_size: tuple[int, int], port: int, args: list[str]) -> int:
    """`run_train`, where the loss of the last process is NaN in the second step; one micro-batch a step."""
    task: Any = tasks.find_task(peek_task(None, args))
    steps, loss, (rank, size) = iter(range(1, 99)), task.loss, rank_and_size

    def poisoned(self: Any, model: Any, batch: Any) -> Any:
        output, bad = loss(self, model, batch), next(steps) == 2 and rank == size - 1
        return output._replace(loss_sum=output.loss_sum * math.nan) if bad else output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "loss", poisoned)
        return run_train(rank_and_size, port, args)


def check_a_nan_is_skipped(pool: Any, folder: Path, args: list[str], strategy: str) -> None:
    """All processes skip the step that is not finite on one: weights and buffers stay, and change in the next step."""
    more = f"run.dir={folder}", f"parallel.strategy={strategy}", "train.checkpoint_every=1", "train.keep_checkpoints=9"
    assert pool.run(2, run_with_nan, free_port(), [*args, *more]) == [0, 0]
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 1]
    assert [record["loss"] is None for record in records] == [False, True, False, False]
    before, after, next_one = (read_weights(folder / f"checkpoints/step_000000{i}").tensors for i in (1, 2, 3))
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert not all(torch.equal(x, next_one[name]) for name, x in before.items())
