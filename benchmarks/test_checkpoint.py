"""Checkpoints: stall of training and time of a verified load, against `torch.save` and `torch.load`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.checkpoint import Training, timed, write
from benchmarks.duel import Duel, no_collection, rotated
from benchmarks.results import FASTMUM, REFERENCE
from benchmarks.sizes import Sizes
from fastmum.engine.checkpoint import Checkpoints, load_checkpoint


def test_checkpoint(duel: Duel, sizes: Sizes, quick: bool, tmp_path: Path) -> None:
    """Weights and moments of a model on the CPU; files in the temporary folder."""
    training, plain = Training(sizes.preset, frames=1), tmp_path / "plain.pt"
    training.step(lambda: None)
    config = dataclasses.asdict(training.config)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, background=True)
    checkpoints.prepare(training.state())
    theirs, ours = ({name: torch.empty_like(x) for name, x in training.state().items()} for _ in range(2))

    @torch.no_grad()
    def load_plain() -> None:
        for name, tensor in torch.load(plain, mmap=False).items():
            theirs[name].copy_(tensor)

    def load_ours() -> None:
        load_checkpoint(tmp_path / "checkpoints", ours, config)

    torch.save(training.state(), plain)
    checkpoints.save(1, training.state(), {"model_config": config})
    checkpoints.wait()
    load_plain(), load_ours()
    _must_be_equal(theirs, training.state())
    _must_be_equal(ours, training.state())

    times: dict[str, dict[str, list[float]]] = {what: {REFERENCE: [], FASTMUM: []} for what in ("wait", "load")}
    with no_collection():
        for number in range(2 if quick else 3):
            for name in rotated([REFERENCE, FASTMUM], number):
                if name == FASTMUM:
                    times["wait"][name].append(write(training, checkpoints, number + 2).stall)
                else:
                    with timed(times["wait"][name]):
                        torch.save(training.state(), plain)
        for number in range(2 if quick else 3):
            for name in rotated([REFERENCE, FASTMUM], number):
                with timed(times["load"][name]):
                    load_ours() if name == FASTMUM else load_plain()
    size = sum(x.numel() * x.element_size() for x in ours.values())
    note = {"note": f"{size / 1e9:.2f} GB"}
    duel.record("checkpoint", "training waits (on the CPU: torch.save; in the background)", times["wait"], **note)
    duel.record("checkpoint", "load (on the CPU: torch.load; verified by checksum)", times["load"], **note)


def _must_be_equal(loaded: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), f"{name} differs from the saved tensor"
