"""The training step against the released model in plain PyTorch, eager and compiled."""

import os

import pytest

from benchmarks.duel import Duel
from benchmarks.sizes import Sizes
from benchmarks.step import PHASES, Comparison
from fastmum.engine.gpus import peak_flops
from fastmum.model.config import step_flops

PHASE_NAMES = {"norm": "gradient norm", "step": "whole step"}
STATE_BYTES = 4 * 4 + 8  # per parameter: weight, gradient, moments, and some activations


def test_step(duel: Duel, sizes: Sizes) -> None:
    """Forward, backward, norm, optimizer, and the whole step."""
    lengths = [sizes.views] * (sizes.frames // sizes.views)
    _need_memory(sizes)
    on_cuda = sizes.device.type == "cuda"
    settings = [*sizes.settings, *([] if on_cuda else ["model.compile=off"])]
    comparison = Comparison(sizes.frames, sizes.views, settings, sizes.compiled)
    try:
        comparison.check()
        comparison.run(sizes.step_rounds)
    finally:
        comparison.close()
    flops = step_flops(sizes.model, sizes.patches, sizes.visible, lengths).total
    peak = _peak(sizes) if on_cuda else None
    for phase in (*PHASES, "step"):
        whole = {"flops": flops, "peak": peak} if phase == "step" else {}
        duel.record("training step", PHASE_NAMES.get(phase, phase), comparison.rounds(phase), **whole)


def _peak(sizes: Sizes) -> float | None:
    from torch.cuda import get_device_name

    return peak_flops(get_device_name(), sizes.precision)


def _need_memory(sizes: Sizes) -> None:
    if sizes.device.type == "cuda" or not hasattr(os, "sysconf"):
        return
    model = sizes.model
    width = model.depth * model.embed_dim**2 + model.decoder_depth * model.decoder_embed_dim**2
    need = 12 * width * STATE_BYTES * (3 if sizes.compiled else 2)
    if (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) < need:
        pytest.skip(f"training {sizes.preset} needs {need / 1e9:.0f} GB of memory, this machine has {memory / 1e9:.0f}")
