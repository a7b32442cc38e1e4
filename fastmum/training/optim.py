"""Optimiser and learning rate: AdamW, linear scaling, warm-up and half a cosine (facts of the paper's run)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmum.config.schema import OptimSection
from fastmum.kernels.adamw import adamw_, advance_
from fastmum.training.master import MasterWeights

BASE_FRAMES = 256  # the base learning rate is for this many frames a step
# Weights updated at once: what stays in a CPU's cache; everything on a GPU, in one launch.
BUNDLE = {"cpu": 1 << 20, "cuda": 1 << 62}


def build_optimizer(model: nn.Module, optim: OptimSection, dtype: torch.dtype = torch.float32) -> AdamW:
    """AdamW for a model that computes with matrices of `dtype`; bfloat16 converts them, see `MasterWeights`."""
    return AdamW(MasterWeights(model, dtype), optim)


class AdamW(torch.optim.AdamW):
    """Fused AdamW on float32 weights; the model's bfloat16 copies of them are renewed on the way.

    One pass over pieces that stay in the cache: the gradient is widened, the master updated, the copy rounded. State
    and its layout are those of `torch.optim.AdamW`.

    Args:
        weights: of the model.
        optim: settings; the rate is set before each step.
    """

    def __init__(self, weights: MasterWeights, optim: OptimSection) -> None:
        self.weights = weights
        named = [(p, p if master is None else master) for _, p, master in weights.named()]
        self._computed_with = {id(master): p for p, master in named}
        masters = [master for _, master in named]
        # Biases, norms and other 1-D parameters do not decay.
        groups = [
            {"params": [p for p in masters if p.ndim > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in masters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        super().__init__(groups, lr=0.0, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the model."""
        self.weights.model.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self) -> None:
        """One update by the gradients of the model's parameters; one that has none is passed over."""
        for group in self.param_groups:
            masters = [p for p in group["params"] if self._computed_with[id(p)].grad is not None]
            states = [self._state(p) for p in masters]
            if states:
                advance_([state["step"] for state in states])
            for copied in (False, True):
                some = [p for p in masters if (self._computed_with[id(p)] is not p) == copied]
                for bundle in _bundles(some):
                    self._update(bundle, group, copied)

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        state = self.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return state

    def _update(self, bundle: list[Piece], group: dict[str, Any], copied: bool) -> None:
        parameters = [self._computed_with[id(piece.tensor)] for piece in bundle]
        states = [self.state[piece.tensor] for piece in bundle]
        masters = [piece.of(piece.tensor) for piece in bundle]
        adamw_(
            masters,
            [piece.of(p.grad) for piece, p in zip(bundle, parameters, strict=True)],
            [piece.of(state["exp_avg"]) for piece, state in zip(bundle, states, strict=True)],
            [piece.of(state["exp_avg_sq"]) for piece, state in zip(bundle, states, strict=True)],
            [piece.of(p) for piece, p in zip(bundle, parameters, strict=True)] if copied else [],
            [state["step"] for state in states],
            lr=group["lr"],
            betas=group["betas"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


class Piece(NamedTuple):
    """Elements [start, stop) of a tensor, in the order of its memory."""

    tensor: Tensor
    start: int
    stop: int

    def of(self, like: Tensor) -> Tensor:
        """The same elements of another tensor with the same shape, (stop - start,)."""
        if like.stride() != self.tensor.stride():
            raise RuntimeError(
                f"strides {like.stride()} of a gradient or moment differ from {self.tensor.stride()} of its weight"
            )
        return like.as_strided((self.stop - self.start,), (1,), like.storage_offset() + self.start)


def _bundles(tensors: list[Tensor]) -> Iterator[list[Piece]]:
    """All elements of the tensors in lists of pieces, each list of as many elements but the last."""
    bundle: list[Piece] = []
    for tensor in tensors:
        limit = BUNDLE.get(tensor.device.type, BUNDLE["cuda"])
        start = 0
        while start < tensor.numel():
            room = limit - sum(piece.stop - piece.start for piece in bundle)
            stop = min(tensor.numel(), start + room)
            bundle.append(Piece(tensor, start, stop))
            start = stop
            if room == stop - bundle[-1].start:
                yield bundle
                bundle = []
    if bundle:
        yield bundle


def learning_rate(step: int, steps: int, optim: OptimSection, frames_per_step: int) -> float:
    """The rate of step `step`, counted from 0: linear up to the peak over the warm-up, then half a cosine to 0.

    The peak is `base_lr` * frames_per_step / 256.
    """
    peak = optim.base_lr * frames_per_step / BASE_FRAMES
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
