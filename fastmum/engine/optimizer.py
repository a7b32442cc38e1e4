"""AdamW on float32 weights, whole or in halves, that can pass over a step on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmum.config.schema import OptimSection
from fastmum.engine.gradients import local
from fastmum.engine.master import MasterWeights, Weight
from fastmum.kernels.adamw import adamw_
from fastmum.kernels.halves import Halves

# Weights updated at once: what stays in a CPU's cache; everything on a GPU, in one launch.
BUNDLE = {"cpu": 1 << 20, "cuda": 1 << 62}

GradientOf = Callable[[nn.Parameter], Tensor | None]


def build_optimizer(model: nn.Module, optim: OptimSection, dtype: torch.dtype = torch.float32) -> Optimizer:
    """The optimiser of a model that computes with matrices of `dtype`; bfloat16 splits them, see `MasterWeights`.

    Raises:
        ConfigError: NVIDIA's Apex is asked for and is not there.
    """
    if optim.optimizer == "apex":
        from fastmum.engine.apex import ApexAdamW, find_fused_adam

        return ApexAdamW(MasterWeights(model, dtype), optim, find_fused_adam())
    return AdamW(MasterWeights(model, dtype), optim)


def own_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Where the gradient of a parameter is when nobody sums it up."""
    return None if parameter.grad is None else local(parameter.grad)


class Optimizer(ABC):
    """AdamW: what its implementations have in common.

    Biases, norms and other 1-D parameters do not decay. A device updates its parts of weights that are shared out.

    Args:
        masters: of the model.
        optim: settings.

    Attributes:
        steps: 0-d float32 on the device, updates that were made.
        moments: Adam's two averages of every weight, shared out and laid out in memory as it is.
    """

    def __init__(self, masters: MasterWeights, optim: OptimSection) -> None:
        self.masters, self.optim = masters, optim
        self.weights = masters.weights
        self.moments = {w.name: (_zeros_like(w.parameter), _zeros_like(w.parameter)) for w in self.weights}
        self.steps = torch.zeros((), device=self.weights[0].parameter.device)

    @abstractmethod
    def step(self, rate: float, gradient: GradientOf = own_gradient, found_inf: Tensor | None = None) -> None:
        """One update.

        Args:
            rate: the learning rate.
            gradient: of a parameter; it is passed over where that is None.
            found_inf: 0-d float32 on the device, 1 where nothing is to be updated. The device alone looks at it.
        """

    def decay(self, weight: Weight) -> float:
        """The weight decay of a weight."""
        return self.optim.weight_decay if weight.parameter.ndim > 1 else 0.0

    def state(self) -> dict[str, Tensor | Halves]:
        """All that is learnt, by name and live, to save and to fill in place: weights, moments, number of updates."""
        state: dict[str, Tensor | Halves] = {"optimizer.steps": self.steps}
        for weight in self.weights:
            state[f"model.{weight.name}"] = weight.stored
            state[f"exp_avg.{weight.name}"], state[f"exp_avg_sq.{weight.name}"] = self.moments[weight.name]
        return state


class AdamW(Optimizer):
    """AdamW of `fastmum.kernels`, on a CPU in pieces that stay in the cache."""

    @torch.no_grad()
    def step(self, rate: float, gradient: GradientOf = own_gradient, found_inf: Tensor | None = None) -> None:
        updates = [
            _Update(*(local(x) for x in (w.parameter.detach(), *self.moments[w.name])), grad, w.rest, self.decay(w))
            for w in self.weights
            if (grad := gradient(w.parameter)) is not None
        ]
        self.steps += 1 if found_inf is None else 1 - found_inf
        for alike in _alike(updates):
            for bundle in _bundles([update.weight for update in alike]):
                self._update([(piece, alike[piece.index]) for piece in bundle], rate, found_inf)

    def _update(self, bundle: list[tuple[Piece, _Update]], rate: float, found_inf: Tensor | None) -> None:
        adamw_(
            [piece.of(update.weight) for piece, update in bundle],
            [piece.of(update.gradient) for piece, update in bundle],
            [piece.of(update.exp_avg) for piece, update in bundle],
            [piece.of(update.exp_avg_sq) for piece, update in bundle],
            [piece.of(update.rest) for piece, update in bundle if update.rest is not None],
            self.steps,
            lr=rate,
            betas=(self.optim.betas[0], self.optim.betas[1]),
            weight_decay=bundle[0][1].decay,
            eps=self.optim.eps,
            found_inf=found_inf,
        )


class _Update(NamedTuple):
    """What is updated, this device's part of it, by which gradient."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient: Tensor
    rest: Tensor | None
    decay: float


def _alike(updates: list[_Update]) -> list[list[_Update]]:
    """Those that can be updated together: of the same decay, whole or halves, of one dtype of gradients."""
    groups: dict[tuple, list[_Update]] = {}
    for update in updates:
        key = update.decay, update.weight.dtype, update.gradient.dtype
        groups.setdefault(key, []).append(update)
    return list(groups.values())


def _zeros_like(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight.detach(), dtype=torch.float32)


class Piece(NamedTuple):
    """Elements [start, stop) of a tensor, in the order of its memory.

    Args:
        tensor: with the layout that others must have.
        index: of the tensor in its list.
    """

    tensor: Tensor
    start: int
    stop: int
    index: int = 0

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
    for index, tensor in enumerate(tensors):
        limit = BUNDLE.get(tensor.device.type, BUNDLE["cuda"])
        start = 0
        while start < tensor.numel():
            room = limit - sum(piece.stop - piece.start for piece in bundle)
            stop = min(tensor.numel(), start + room)
            bundle.append(Piece(tensor, start, stop, index))
            start = stop
            if room == stop - bundle[-1].start:
                yield bundle
                bundle = []
    if bundle:
        yield bundle
