"""Checkpoints: what training waits for, and how long a verified load takes, against `torch.save` and `torch.load`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.checkpoint import Training, write
from benchmarks.duel import Duel
from benchmarks.results import FASTMUM, REFERENCE
from benchmarks.sizes import Sizes
from fastmum.training.checkpoint import Checkpoints, load_checkpoint
from fastmum.training.memory import keep_freed_memory


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = perf_counter()
    action()
    return perf_counter() - began


def test_checkpoint(duel: Duel, sizes: Sizes, quick: bool, tmp_path: Path) -> None:
    """Weights and moments of a model in training on the CPU, from and to the disk of the system's temporary folder."""
    keep_freed_memory()
    training, plain = Training(sizes.preset, frames=1), tmp_path / "plain.pt"
    training.step(lambda: None)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, background=True)
    checkpoints.prepare(training.state())
    times: dict[str, dict[str, list[float]]] = {what: {REFERENCE: [], FASTMUM: []} for what in ("wait", "load")}
    for number in range(2 if quick else 3):
        times["wait"][REFERENCE].append(timed(lambda: torch.save(training.state(), plain)))
        times["wait"][FASTMUM].append(write(training, checkpoints, number + 1).stall)
    checkpoints.save(100, training.state(), {"model_config": dataclasses.asdict(training.config)})
    checkpoints.wait()
    torch.save(training.state(), plain)

    like, config = ({k: torch.empty_like(v) for k, v in training.state().items()} for _ in range(2)), None
    theirs, ours = like
    config = dataclasses.asdict(training.config)

    def load_plain() -> None:
        for name, tensor in torch.load(plain, mmap=False).items():
            theirs[name].copy_(tensor)

    def load_ours() -> None:
        load_checkpoint(tmp_path / "checkpoints", ours, config)

    with torch.no_grad():
        load_plain(), load_ours()
        _must_be_equal(theirs, training.state())
        _must_be_equal(ours, training.state())
        for _ in range(2 if quick else 3):
            times["load"][REFERENCE].append(timed(load_plain))
            times["load"][FASTMUM].append(timed(load_ours))
    size = sum(x.numel() * x.element_size() for x in ours.values())
    note = {"note": f"{size / 1e9:.2f} GB"}
    duel.record("checkpoint", "training waits (torch.save; in the background)", times["wait"], **note)
    duel.record("checkpoint", "load (torch.load; verified by checksum)", times["load"], **note)


def _must_be_equal(loaded: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), f"{name} is not what was saved"
