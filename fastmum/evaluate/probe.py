"""Linear probes for dense matching, all trained at once.

A probe is a square matrix applied to frozen features. There is one for each learning rate and weight decay; they form
one tensor with one optimizer, so that a step reads the features once for all of them.

Legend: Q probes, B pairs of a step, N pairs, P patches of a frame, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastmum.evaluate.features import Prepared
from fastmum.evaluate.matcher import TEMPERATURE, cosine_logits, decode, nearest_patch
from fastmum.geometry.metrics import MatchScores, match_errors, match_scores


@dataclass(frozen=True)
class ProbeSettings:
    """Training of the probes: steps, batch and evaluate_every as in the paper (supplement, section B).

    Every combination of learning rate and weight decay makes a probe; the paper does not name the values. A value out
    of range is a ValueError that starts with the field.
    """

    steps: int = 25_000
    batch: int = 8  # pairs
    evaluate_every: int = 2_500  # steps
    learning_rates: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    weight_decays: tuple[float, ...] = (0.0, 1e-2, 1e-1)
    temperature: float = TEMPERATURE  # of the matcher
    seed: int = 0  # of the order of pairs

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if not self.learning_rates or not all(0 < rate < inf for rate in self.learning_rates):
            raise ValueError(f"learning_rates are {list(self.learning_rates)}, but must be positive")
        if not self.weight_decays or not all(0 <= decay < inf for decay in self.weight_decays):
            raise ValueError(f"weight_decays are {list(self.weight_decays)}, but must be at least 0")
        if not 0 < self.temperature < inf:
            raise ValueError(f"temperature is {self.temperature}, but must be positive")

    def probes(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of each probe."""
        return list(itertools.product(self.learning_rates, self.weight_decays))


class BatchedAdamW:
    """AdamW (Loshchilov and Hutter, 2019) on a stack of Q parameters (Q, ...), updated in place.

    `learning_rates` and `weight_decays` have one value for each parameter. Betas and eps are PyTorch's defaults.
    """

    def __init__(self, stack: Tensor, learning_rates: list[float], weight_decays: list[float]) -> None:
        shape = (-1, *[1] * (stack.ndim - 1))
        self.stack, self.betas, self.eps, self.steps = stack, (0.9, 0.999), 1e-8, 0
        self.rates, decays = (stack.new_tensor(values).view(shape) for values in (learning_rates, weight_decays))
        self.keep = 1 - self.rates * decays
        self.mean, self.square = torch.zeros_like(stack), torch.zeros_like(stack)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Update the stack by its gradient (Q, ...)."""
        self.steps += 1
        (beta1, beta2), t = self.betas, self.steps
        self.mean.lerp_(gradient, 1 - beta1)
        self.square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = self.square.sqrt().div_((1 - beta2**t) ** 0.5).add_(self.eps)
        self.stack.mul_(self.keep).sub_(self.rates / (1 - beta1**t) * self.mean / deviation)


class Evaluated(NamedTuple):
    """An evaluation of all probes: training losses are means since the last evaluation."""

    step: int
    losses: list[float]
    scores: list[MatchScores]


class Trained(NamedTuple):
    """Trained probes; the best has the least end-point error at any evaluation."""

    history: list[Evaluated]
    best: tuple[int, int]  # indices of the probe and of the evaluation
    warps: Tensor  # (N, P, 2) of the test pairs by that probe at that evaluation


def train_probes(
    train: Prepared, test: Prepared, settings: ProbeSettings, device: torch.device, progress: bool = True
) -> Trained:
    """Train all probes in one pass and keep the best. They start as the identity, which is cosine matching.

    Raises:
        FloatingPointError: no probe gave a finite warp at any evaluation.
    """
    rates, decays = zip(*settings.probes(), strict=True)
    width = train.features.shape[-1]
    stack = torch.eye(width, device=device).repeat(len(rates), 1, 1).requires_grad_()
    optimizer = BatchedAdamW(stack, list(rates), list(decays))
    history: list[Evaluated] = []
    best, least, kept = (0, 0), inf, torch.empty(0)
    total, since = torch.zeros(len(rates), device=device), 0
    drawn, label = _draw(train, settings), f"{len(rates)} probes"
    bar = tqdm(drawn, desc=label, unit="step", total=settings.steps, disable=not progress)
    for step, pairs in enumerate(bar, 1):
        losses = _losses(stack, train, pairs, settings.temperature, device)
        (gradient,) = torch.autograd.grad(losses.sum(), stack)
        optimizer.step(gradient)
        total, since = total + losses.detach(), since + 1
        if step % settings.evaluate_every and step < settings.steps:
            continue
        errors, warps = match_all(stack.detach(), test, settings, device)
        found = match_scores(errors, test.truth.visible)
        history.append(Evaluated(step, (total / since).tolist(), found))
        probe = min(range(len(found)), key=lambda i: found[i].epe if isfinite(found[i].epe) else inf)
        if found[probe].epe < least:
            best, least = (probe, len(history) - 1), found[probe].epe
            kept = warps[probe]
        total, since = torch.zeros_like(total), 0
        bar.set_postfix(epe=f"{found[probe].epe:.2f}", best=f"{least:.2f}")
    if least == inf:
        raise FloatingPointError("all probes diverged: lower the learning rates")
    return Trained(history, best, kept)


def matching_losses(logits: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """Negative log-likelihood of the target patches, mean over the visible points.

    logits (..., B, P, P'), target (B, P) int64, visible (B, P) bool -> (...).
    """
    likelihood = logits.log_softmax(-1).gather(-1, target.expand(logits.shape[:-1])[..., None])[..., 0]
    return -torch.where(visible, likelihood, 0).sum((-2, -1)) / visible.sum()


def _losses(stack: Tensor, data: Prepared, pairs: Tensor, temperature: float, device: torch.device) -> Tensor:
    a, b = data.of(pairs, device)
    logits = cosine_logits(project(stack, a), project(stack, b), temperature)
    target = nearest_patch(data.truth.target[pairs], data.truth.grid)
    return matching_losses(logits, target.to(device), data.truth.visible[pairs].to(device))


def project(stack: Tensor, features: Tensor) -> Tensor:
    """Features (B, P, D) times every probe (Q, D, D) -> (Q, B, P, D)."""
    return (features.flatten(0, 1) @ stack).unflatten(1, features.shape[:2])


def _draw(data: Prepared, settings: ProbeSettings) -> Iterator[Tensor]:
    """Indices of each step's pairs: random permutations of the pairs that have a visible point."""
    rng = torch.Generator().manual_seed(settings.seed)
    usable = data.truth.visible.any(-1).nonzero()[:, 0]
    waiting = usable[:0]
    for _ in range(settings.steps):
        while len(waiting) < settings.batch:
            waiting = torch.cat([waiting, usable[torch.randperm(len(usable), generator=rng)]])
        yield waiting[: settings.batch]
        waiting = waiting[settings.batch :]


@torch.no_grad()
def match_all(stack: Tensor, data: Prepared, settings: ProbeSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Errors (Q, N, P) in pixels and warps (Q, N, P, 2) of all probes, on the CPU."""
    warps = []
    for pairs in torch.arange(len(data.first)).split(settings.batch):
        a, b = data.of(pairs, device)
        logits = cosine_logits(project(stack, a), project(stack, b), settings.temperature)
        warps.append(decode(logits, data.truth.grid).cpu())
    estimated = torch.cat(warps, dim=1)
    return match_errors(estimated, data.truth.target), estimated
