"""Which parts of the model `torch.compile` compiles, and when."""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch._dynamo
from torch import nn

from fastmum.model.block import Block
from fastmum.model.config import COMPILE_MODES
from fastmum.model.encoder import Encoder
from fastmum.model.mum import MuM

log = logging.getLogger(__name__)

# On a CPU compiled blocks save at most 1 % of a step and cost half a minute (docs/LOG.md, 2026-11-23).
CPU_STEPS_TO_PAY = 100_000
HOST_LENGTHS = ("sdpa", "xformers")  # attention that reads lengths on the host, where CUDA graphs record nothing
RECOMPILE_LIMIT = 64  # four kinds of block, for every combination of gradients, sizes and precision of a program


def compile_model(
    model: Encoder, mode: str, steps: int, backend: str | Callable = "inductor", several_devices: bool = False,
    cuda_graphs: bool = False,
) -> str:  # fmt: skip
    """Compile a model in place; log and return the chosen mode: "block", "full" or "off". Every region is one graph.

    Lengths that change between batches recompile nothing: regions have static shapes (see `MuM._global_attention`).
    ValueError: an unknown mode, or CUDA graphs where there are none.

    Args:
        model: on its training device.
        mode: "block" compiles each kind of block, "full" everything between a MuM's raw frames and its loss as one
            region (an encoder without decoder: its blocks), "off" nothing; "auto" is "block" on CUDA, and on the CPU if
            the run is long enough to save time.
        steps: remaining steps of the run.
        several_devices: "full" becomes "block", because gradients are reduced over devices during the backward pass.
        cuda_graphs: record compiled regions as CUDA graphs.
    """
    device = next(model.parameters()).device
    is_cuda, chosen = device.type == "cuda", choose_mode(mode, device, steps)
    if chosen == "full" and not isinstance(model, MuM):
        chosen = "block"
    if chosen == "full" and several_devices:
        log.warning("blocks are compiled instead of the whole model: gradients are reduced during the backward pass")
        chosen = "block"
    if cuda_graphs and (chosen == "off" or not is_cuda):
        what = "nothing is compiled" if is_cuda else "the model is not on a CUDA device"
        raise ValueError(f"CUDA graphs record what is compiled for CUDA, and {what}")
    if cuda_graphs and isinstance(model, MuM) and model.attention in HOST_LENGTHS:
        log.warning(
            "attention by %s reads lengths on the host: regions that contain it are not recorded as CUDA graphs",
            model.attention,
        )
    log.info("torch.compile: %s%s", chosen, f" (model.compile={mode})" if mode != chosen else "")
    how: dict[str, Any] = {"fullgraph": True, "backend": backend}
    if isinstance(model, MuM):
        model.cuda_graphs = cuda_graphs
    if backend == "inductor":
        how["options"] = {"size_asserts": False, "alignment_asserts": False, "triton.cudagraphs": cuda_graphs}
    if chosen == "block":
        compute = torch.compile(Block._compute, **how)
        for block in blocks_of(model):
            block.compiled_compute = compute
    elif isinstance(model, MuM) and chosen == "full":
        model.compiled_autoencode = torch.compile(MuM._autoencode, **how)
    return chosen


def compile_kinds(
    modules: Iterable[nn.Module], kinds: Sequence[type[Any]], mode: str, device: torch.device, steps: int,
    dynamic: bool | None = None,
) -> None:  # fmt: skip
    """Compile `_compute` of each of some kinds of module in place, if `choose_mode` says so; log the mode."""
    chosen = choose_mode(mode, device, steps)
    log.info("torch.compile: %s", chosen)
    if chosen == "off":
        return
    computes = {kind: torch.compile(kind._compute, fullgraph=True, dynamic=dynamic) for kind in kinds}
    for module in modules:
        # FSDP2 replaces the class of a module by a subclass.
        if kind := next((each for each in type(module).__mro__ if each in computes), None):
            cast(Any, module).compiled_compute = computes[kind]


def choose_mode(mode: str, device: torch.device, steps: int) -> str:
    """The mode "auto" resolved, as in `compile_model`; "off" if there is no compiler. ValueError: an unknown mode."""
    if mode not in COMPILE_MODES:
        raise ValueError(f"compile mode is '{mode}', but must be one of {', '.join(COMPILE_MODES)}")
    pays = device.type == "cuda" or steps >= CPU_STEPS_TO_PAY
    chosen = mode if mode != "auto" else "block" if pays else "off"
    if chosen != "off" and not has_cpp_compiler():
        log.warning("no C++ compiler is found (g++, clang++ or $CXX), so nothing is compiled and the model runs eager")
        chosen = "off"
    if chosen != "off":
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return chosen


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run the regions of a model uncompiled: evaluation has other sizes, for which compiling does not pay.

    Attention that is compiled separately (`flex`) stays compiled: eager, it would hold the scores of all tokens.
    """
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            for region in ("compiled_compute", "compiled_autoencode"):
                if (compiled := vars(module).get(region)) is not None:
                    stack.callback(setattr, module, region, compiled)
                    setattr(module, region, None)
        yield


def blocks_of(model: Encoder) -> tuple[Block, ...]:
    """All blocks of encoder and decoder."""
    decoder = (*model.decoder_frame_blocks, *model.decoder_global_blocks) if isinstance(model, MuM) else ()
    return (*model.blocks, *decoder)


def has_cpp_compiler() -> bool:
    """Whether Inductor finds a compiler for what it generates."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return any(shutil.which(name) is not None for name in names)
