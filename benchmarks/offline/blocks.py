"""Blocks that are compiled one by one in an eager model: `model.compile=block`.

Each kind of block is lowered once. A call of the model records the kernels of its two graphs and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from benchmarks.offline.inductor import Region, compile_region, signature
from benchmarks.offline.recorder import Recorder
from fastmum.model.block import Block


class Blocks:
    """The compiled kinds of block.

    Args:
        recorder: of the step.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.regions: dict[str, Region] = {}

    @property
    def sources(self) -> dict[str, str]:
        """Triton code of all kinds, by name."""
        return {
            f"{i}/{name}": code
            for i, region in enumerate(self.regions.values())
            for name, code in region.sources.items()
        }

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it calls of blocks are calls of their regions."""

        def call(block: Block, *args: object) -> object:
            region = self.regions[_kind(args)]
            tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
            outputs = _Call.apply(self.recorder, region, *tensors, *block.parameters())
            return outputs[0] if len(outputs) == 1 else outputs

        with mock.patch.object(Block, "forward", call):
            yield


def compile_blocks(loss: Callable[[], Tensor], recorder: Recorder) -> Blocks:
    """Lower every kind of block that a forward pass calls.

    Args:
        loss: the forward pass of a model that is not compiled, on fake tensors.
        recorder: not recording now.
    """
    found: dict[str, tuple] = {}
    plain = Block.forward

    def note(block: Block, *args: object) -> object:
        found.setdefault(_kind(args), (block, *args))
        return plain(block, *args)

    with mock.patch.object(Block, "forward", note):
        loss()
    blocks = Blocks(recorder)
    for kind, call in found.items():
        blocks.regions[kind] = compile_region(plain, pytree.tree_map_only(Tensor, _as_input, call), recorder)
    return blocks


def _as_input(x: Tensor) -> Tensor:
    """A leaf of the same shape that needs a gradient if `x` does."""
    return x if x.is_leaf else x.detach().requires_grad_(x.requires_grad)


def _kind(args: tuple) -> str:
    """The key of a compilation: shapes, dtypes, strides and everything else than tensors."""
    return repr(pytree.tree_map_only(Tensor, lambda x: f"{x.dtype}{tuple(x.shape)}{x.stride()}", args))


class _Call(torch.autograd.Function):
    """A call of a region: its memory and its kernels."""

    @staticmethod
    def forward(ctx: object, recorder: Recorder, region: Region, *inputs: Tensor) -> tuple[Tensor, ...]:
        recorder.lived_with(region.forward.peak)
        recorder.record(region.forward.kernels)
        ctx.recorder, ctx.region = recorder, region
        ctx.saved = [torch.empty_like(x) for x in region.saved]
        ctx.held = [x for x in inputs if signature(x) in region.held]
        ctx.signatures = [signature(x) for x in inputs]
        return tuple(torch.empty_like(x) for x in region.outputs)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The graph's own peak includes saved tensors and incoming gradients.
        ctx.saved = None
        incoming = sum(x.untyped_storage().nbytes() for x in grads)
        ctx.recorder.lived_with(ctx.region.backward.peak - incoming)
        ctx.recorder.record(ctx.region.backward.kernels)
        needed = ctx.needs_input_grad[2:]
        signatures = zip(ctx.signatures, needed, strict=True)
        made = [torch.empty(shape, dtype=dtype) if wanted else None for (shape, dtype), wanted in signatures]
        ctx.held = None
        return None, None, *made
