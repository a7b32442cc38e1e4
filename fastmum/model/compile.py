"""Which parts of the model `torch.compile` compiles, and when."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo

from fastmum.model.block import Block
from fastmum.model.config import COMPILE_MODES
from fastmum.model.mum import MuM

log = logging.getLogger(__name__)

# On a CPU compiled blocks save at most 1 % of a step and cost half a minute (docs/LOG.md, 2026-11-23).
CPU_STEPS_TO_PAY = 100_000
# Four kinds of block, each once for every combination of gradients, sizes and precision that a program uses.
RECOMPILE_LIMIT = 64


def compile_model(
    model: MuM,
    mode: str,
    steps: int,
    backend: str | Callable = "inductor",
    several_devices: bool = False,
    cuda_graphs: bool = False,
) -> str:
    """Compile a model in place and say in the log what was done; every region must be one graph.

    Lengths that change from batch to batch compile nothing anew: regions are static in shape (see `MuM._views`).

    Args:
        model: on the device that it trains on.
        mode: "block" compiles each kind of block, "full" everything between the raw frames and the loss as one region,
            "off" nothing; "auto" is "block" on CUDA, and on the CPU where a run is long enough to pay for it.
        steps: that the run has still to do.
        backend: of `torch.compile`.
        several_devices: gradients are summed over devices while the backward pass goes on, which one graph for all of
            it would not let them: "full" becomes "block".
        cuda_graphs: record what is compiled as CUDA graphs.

    Returns:
        What was chosen: "block", "full" or "off".

    Raises:
        ValueError: an unknown mode, or CUDA graphs where there are none.
    """
    if mode not in COMPILE_MODES:
        raise ValueError(f"compile mode is '{mode}', but must be one of {', '.join(COMPILE_MODES)}")
    chosen = mode
    if mode == "auto":
        pays = model.mask_token.is_cuda or steps >= CPU_STEPS_TO_PAY
        chosen = "block" if pays else "off"
    if chosen != "off" and not has_cpp_compiler():
        log.warning("no C++ compiler is found (g++, clang++ or $CXX), so nothing is compiled and the model runs eager")
        chosen = "off"
    if chosen == "full" and several_devices:
        log.warning("blocks are compiled, not the whole: gradients travel while the backward pass goes on")
        chosen = "block"
    if cuda_graphs and (chosen == "off" or not model.mask_token.is_cuda):
        what = "nothing is compiled" if model.mask_token.is_cuda else "the model is not on a CUDA device"
        raise ValueError(f"CUDA graphs record what is compiled for CUDA, and {what}")
    log.info("torch.compile: %s%s", chosen, f" (model.compile={mode})" if mode != chosen else "")
    if chosen != "off":
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    how: dict[str, Any] = {"fullgraph": True, "backend": backend} | (
        {"options": {"triton.cudagraphs": True}} if cuda_graphs else {}
    )
    if chosen == "block":
        compute = torch.compile(Block._compute, **how)
        for block in blocks_of(model):
            block.compiled_compute = compute
    elif chosen == "full":
        model.compiled_autoencode = torch.compile(MuM._autoencode, **how)
    return chosen


@contextmanager
def eager(model: MuM) -> Iterator[None]:
    """Run the regions of a model as they are written: evaluation has sizes of its own, not worth compiling for.

    Attention that is compiled by itself (`flex`) stays so: as written, it would hold the scores of all tokens at once.
    """
    blocks = [(block, block.compiled_compute) for block in blocks_of(model)]
    whole = model.compiled_autoencode
    for block, _ in blocks:
        block.compiled_compute = None
    model.compiled_autoencode = None
    try:
        yield
    finally:
        for block, compiled in blocks:
            block.compiled_compute = compiled
        model.compiled_autoencode = whole


def blocks_of(model: MuM) -> tuple[Block, ...]:
    return (*model.blocks, *model.decoder_frame_blocks, *model.decoder_global_blocks)


def has_cpp_compiler() -> bool:
    """Whether Inductor finds a compiler for what it generates."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return any(shutil.which(name) is not None for name in names)
