"""AdamW, averages of the weights, learning-rate schedules. bfloat16 models keep the float32 weights in two halves.

Under autocast every step would cast every matrix to bfloat16 and every gradient back. Here the model holds the matrices
in bfloat16 and their gradients are bfloat16. The optimizer holds the lower 16 bits of the float32 weight (the `rest`),
and joins and splits the halves in its one pass (`fastmum.kernels.adamw`). The numbers are those of autocast except for
exact ties, one value of 131,072, which are rounded away from zero instead of to even.
"""

from __future__ import annotations

import contextlib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastmum.config.schema import OptimSection
from fastmum.engine.distributed import DistContext
from fastmum.engine.gradients import local
from fastmum.engine.task import ParamGroup, default_groups
from fastmum.kernels.adamw import Halves, Update
from fastmum.kernels.tables import addresses_of, is_plain, same_order

# Elements updated by one call: what stays in a CPU's cache; everything in one launch on a GPU.
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 62}
# Modules whose weights and biases autocast would cast.
CAST_MODULES = (nn.Linear, nn.Conv2d)

GradientOf = Callable[[nn.Parameter], Tensor | None]


class Weight(NamedTuple):
    """A trainable weight; `rest` is the int16 lower half of the float32 weight of a bfloat16 parameter, else None."""

    name: str
    parameter: nn.Parameter
    rest: Tensor | None
    lr_scale: float = 1.0
    weight_decay: float = 0.0
    matrices: int = 0  # those that Muon orthogonalises, stacked along the rows; 0: AdamW

    @property
    def stored(self) -> Tensor | Halves:
        """The float32 weight in memory: a tensor or its halves."""
        parameter = self.parameter.detach()
        return parameter if self.rest is None else Halves(parameter, self.rest)

    @property
    def master(self) -> Tensor:
        """The float32 weight: the parameter, or its joined halves in new memory."""
        stored = self.stored
        return stored.join() if isinstance(stored, Halves) else stored


def split_weights(
    model: nn.Module, groups: Sequence[ParamGroup], dtype: torch.dtype, exact: Iterable[nn.Module] = ()
) -> list[Weight]:
    """The trainable weights of a float32 model, in its order; matrices and their biases become `dtype`, in place.

    torch.bfloat16 splits the weights into halves, but for modules in `exact`. torch.float32 changes nothing, as for
    models sharded by FSDP, which casts when it gathers. ValueError: a trainable parameter in no group or in several, or
    a frozen one in a group.
    """
    group_of: dict[nn.Parameter, ParamGroup] = {}
    for group in groups:
        for parameter in group.parameters:
            if parameter in group_of:
                raise ValueError(f"a parameter is in the groups '{group_of[parameter].name}' and '{group.name}'")
            group_of[parameter] = group
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (parameter in group_of):
            state = "trainable, but in no group" if parameter.requires_grad else "frozen, but in a group"
            raise ValueError(f"the parameter '{name}' is {state}")
    rests: dict[nn.Parameter, Tensor] = {}
    whole = {module for part in exact for module in part.modules()}
    for module in model.modules():
        if isinstance(module, CAST_MODULES) and module not in whole:
            for p in module.parameters(recurse=False):
                if p in group_of and p.dtype != dtype:
                    p.data, rests[p] = Halves.of(p.detach())
    weights = [
        Weight(name, p, rests.get(p), own.lr_scale, own.weight_decay if p.ndim > 1 or own.decay_vectors else 0.0)
        for name, p in model.named_parameters()
        if (own := group_of.get(p)) is not None
    ]

    def clear_rests(model: nn.Module, incompatible: object) -> None:
        for weight in weights:
            if weight.rest is not None:
                weight.rest.zero_()

    model.register_load_state_dict_post_hook(clear_rests)  # the loaded bfloat16 weights are exact
    return weights


def build_optimizer(
    model: nn.Module, optim: OptimSection, dtype: torch.dtype = torch.float32,
    groups: Sequence[ParamGroup] | None = None, matrices: Mapping[nn.Parameter, int] | None = None,
    world: DistContext | None = None, product_dtype: torch.dtype | None = None, exact: Iterable[nn.Module] = (),
) -> Optimizer:  # fmt: skip
    """The optimizer of a model with matrices of `dtype`; ConfigError if `optim.optimizer` cannot be used.

    `exact` are modules whose matrices stay float32 (`Task.exact`). For Muon: `matrices` as in `Task.matrices`, and the
    dtype of its products, by default `dtype`.
    """
    weights = split_weights(model, groups or default_groups(model, optim), dtype, exact)
    if optim.optimizer == "muon":
        from fastmum.engine.muon import Muon

        weights = [w._replace(matrices=(matrices or {}).get(w.parameter, 0)) for w in weights]
        return Muon(weights, optim, world or DistContext(), product_dtype or dtype)
    if optim.optimizer == "apex":
        from fastmum.engine.apex import ApexAdamW, find_fused_adam

        return ApexAdamW(weights, optim, find_fused_adam())
    return AdamW(weights, optim)


def own_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Default gradient source: the local shard of `parameter.grad`."""
    return None if parameter.grad is None else local(parameter.grad)


class Optimizer(ABC):
    """Base class of the optimizers. Each process updates its own shards.

    `steps` counts the updates made, 0-d float32 on the device; `moments` has the averages of every weight by name, in
    its layout and sharding: of the gradient, and of its square (not for matrices of Muon).
    """

    def __init__(self, weights: list[Weight], optim: OptimSection) -> None:
        self.weights, self.optim = weights, optim
        zeros = functools.partial(torch.zeros_like, dtype=torch.float32)
        self.moments = {
            w.name: tuple(zeros(w.parameter.detach()) for _ in range(1 if w.matrices else 2)) for w in weights
        }
        self.steps = torch.zeros((), device=weights[0].parameter.device)

    @abstractmethod
    def step(self, rate: float, gradient: GradientOf = own_gradient, found_inf: Tensor | None = None) -> None:
        """One update at a learning rate, before the groups' scales; weights without a gradient are skipped.

        `found_inf`, 0-d float32 on the device, skips the update if it is 1, without a synchronisation.
        """

    def state(self) -> dict[str, Tensor | Halves]:
        """Live tensors by name, to save and to fill in place: weights, moments, number of updates."""
        state: dict[str, Tensor | Halves] = {"optimizer.steps": self.steps}
        for weight in self.weights:
            state[f"model.{weight.name}"] = weight.stored
            for kind, moment in zip(("exp_avg", "exp_avg_sq"), self.moments[weight.name], strict=False):
                state[f"{kind}.{weight.name}"] = moment
        return state


class AdamW(Optimizer):
    """AdamW of `fastmum.kernels`, on a CPU in chunks that stay in the cache.

    Updates are prepared for the weights that have a gradient, and again if these, their dtypes or the addresses of
    weights are others than in the last step.
    """

    def __init__(self, weights: list[Weight], optim: OptimSection) -> None:
        super().__init__(weights, optim)
        self._own = [w for w in weights if not w.matrices]
        self._parameters = [w.parameter for w in self._own]
        self._is_plain = all(map(is_plain, self._parameters))
        self._prepared: tuple[list[torch.dtype | None], list[int]] = [], []
        self._updates: list[tuple[list[Piece], Update, float, float]] = []

    @torch.no_grad()
    def step(self, rate: float, gradient: GradientOf = own_gradient, found_inf: Tensor | None = None) -> None:
        grads = [*map(gradient, self._parameters)]
        shards = self._parameters if self._is_plain else [*map(local, self._parameters)]
        places = addresses_of(shards) if shards and is_plain(shards[0]) else []
        kinds = [None if grad is None else grad.dtype for grad in grads]
        if (kinds, places) != self._prepared:
            self._prepared, self._updates = (kinds, places), self._prepare(grads)
        self.steps += 1 if found_inf is None else 1 - found_inf
        betas = self.optim.betas[0], self.optim.betas[1]
        for pieces, update, decay, lr_scale in self._updates:
            some = [piece.of(cast(Tensor, grads[piece.number])) for piece in pieces]
            update(some, self.steps, rate * lr_scale, betas, decay, self.optim.eps, found_inf)

    def _prepare(self, grads: Sequence[Tensor | None]) -> list[tuple[list[Piece], Update, float, float]]:
        """Pieces of the gradients and their updates, with weight decay and scale of the learning rate."""
        # Numbers of weights by the settings that one call must have in common.
        alike: dict[tuple, list[int]] = {}
        for i, (w, grad) in enumerate(zip(self._own, grads, strict=True)):
            if grad is not None:
                key = w.weight_decay, w.lr_scale, w.parameter.dtype, grad.dtype, w.rest is None
                alike.setdefault(key, []).append(i)
        prepared = []
        for (decay, lr_scale, *_, whole), numbers in alike.items():
            for pieces in chunks((i, local(self._own[i].parameter.detach())) for i in numbers):
                own = [(piece, self._own[piece.number]) for piece in pieces]
                exp_avgs, exp_avg_sqs = (
                    [piece.of(local(self.moments[w.name][k])) for piece, w in own] for k in range(2)
                )
                rests = [] if whole else [piece.of(cast(Tensor, w.rest)) for piece, w in own]
                update = Update([piece.of(piece.tensor) for piece in pieces], exp_avgs, exp_avg_sqs, rests)
                prepared.append((pieces, update, decay, lr_scale))
        return prepared


class Ema:
    """float32 exponential moving averages of the trainable weights (`train.ema`), sharded as they are."""

    def __init__(self, weights: Sequence[Weight], decay: float) -> None:
        self._weights, self._decay = weights, decay
        self._averages = {w.name: w.master.detach().clone() for w in weights}

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Average in the weights of a step; a skipped step (`found_inf` is 1) changes nothing."""
        share = (1 - self._decay) * (1 - found_inf)
        for w in self._weights:
            local(self._averages[w.name]).lerp_(local(w.master), share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters' values by the averages inside the block."""
        live = [local(w.parameter.detach()) for w in self._weights]
        kept = [values.clone() for values in live]
        for values, w in zip(live, self._weights, strict=True):
            values.copy_(local(self._averages[w.name]))
        try:
            yield
        finally:
            for values, before in zip(live, kept, strict=True):
                values.copy_(before)

    def state(self) -> dict[str, Tensor]:
        """Live averages by name, to save and to fill in place."""
        return {f"ema.{name}": average for name, average in self._averages.items()}


class Piece(NamedTuple):
    """Elements [start, stop) of the tensor `number` of a list, in memory order."""

    number: int
    tensor: Tensor
    start: int
    stop: int
    is_whole: bool

    def of(self, like: Tensor) -> Tensor:
        """The same elements of another tensor with the same layout: all of it, or (stop - start,)."""
        if self.is_whole:  # whose users compare the layouts
            return like
        if not same_order(like, self.tensor):
            raise RuntimeError(f"a gradient or moment has strides {like.stride()}, its weight {self.tensor.stride()}")
        return like.as_strided((self.stop - self.start,), (1,), like.storage_offset() + self.start)


def chunks(tensors: Iterable[tuple[int, Tensor]]) -> Iterator[list[Piece]]:
    """All elements of numbered tensors, in lists of pieces with `CHUNK` elements each; the last has fewer."""
    chunk: list[Piece] = []
    room = 0
    for number, tensor in tensors:
        start = 0
        while start < tensor.numel():
            room = room or CHUNK.get(tensor.device.type, CHUNK["cuda"])
            stop = min(tensor.numel(), start + room)
            is_whole = (start, stop) == (0, tensor.numel())
            chunk.append(Piece(number, tensor, start, stop, is_whole))
            start, room = stop, room - (stop - start)
            if not room:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def learning_rate(step: int, steps: int, optim: OptimSection, samples_per_step: int) -> float:
    """The learning rate of a step, counted from 0.

    Linear warm-up to the peak `base_lr` * samples_per_step / `lr_frames`, then by `optim.schedule`:
    cosine: half a cosine down to `min_lr` (scaled like the peak); step: times `gamma` at each milestone; wsd: constant,
    then linear to `min_lr` over the last `decay_share` of all steps.
    """
    scale = samples_per_step / optim.lr_frames if optim.lr_frames else 1.0
    first, peak, least = (rate * scale for rate in (optim.warmup_lr, optim.base_lr, optim.min_lr))
    if step < optim.warmup_steps:
        return first + (peak - first) * (step + 1) / optim.warmup_steps
    if optim.schedule == "step":
        return peak * optim.gamma ** sum(step >= milestone for milestone in optim.milestones)
    if optim.schedule == "wsd":
        decay = max(1, round(steps * optim.decay_share))
        progress = max(0.0, (step - (steps - decay)) / decay)
        return peak + (least - peak) * progress
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))
