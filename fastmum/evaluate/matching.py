"""Dense matching by linear probes and by cosine similarity (Tables 4 and 13; supplement, sections B and C).

The kernel nearest-neighbour matcher is RoMa's coarse matcher with an exponential cosine kernel: the softmax-weighted
mean of the best patch and its four neighbours. A probe is a square matrix applied to frozen features, one for each
learning rate and weight decay. They form one tensor, so that a step reads the features once for all of them.

The protocol "matchbench" is the one that MuM's author has published since (davnords/poincar3, `matchbench`).

Legend: Q probes, B pairs of a step, N pairs, P patches of a frame, D width.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmum.data.errors import DataError
from fastmum.evaluate.features import NORMS, Norm, Prepared, Truth, prepare
from fastmum.evaluate.pairs import PairSet
from fastmum.evaluate.recall import object_recall
from fastmum.evaluate.scoring import BATCH, Protocol, measured, score_warps, scored_points
from fastmum.geometry.metrics import MatchScores
from fastmum.geometry.warp import grid_points
from fastmum.progress import progress_bar

T = TypeVar("T")

TEMPERATURE = 0.1  # of the exponential cosine kernel; RoMa's Gaussian process has 0.2
TAPS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # (row, column) offsets: the best patch and its neighbours
SHRINKAGE = 0.01  # of the covariance of true matches
EVERY = 6  # every sixth training scene is left out to choose the probe
# Of matchbench: joint norm of the gradients of all probes; share of the steps after which learning rates are divided.
CLIP, DECAY_AT, DECAY = 0.01, 0.9, 0.1


class Result(NamedTuple):
    """The result of an evaluation."""

    numbers: dict[str, Any]  # for JSON; "scores" are those of the table, "no_motion" those of the identity warp
    warps: Tensor | None  # (N, P, 2) unit coordinates of the patch centres of A in B, if they are estimated
    size: int  # side of the pictures in pixels
    targets: Sequence[Any] = ()  # the `Target`s that `evaluate_views` measured


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
    seed: int = 0  # of the order of pairs, and of the first weights of matchbench
    protocol: Protocol = "patches"

    @classmethod
    def of(cls, protocol: Protocol, **fields: Any) -> Self:
        """Settings with the defaults of a protocol: matchbench has 10,000 steps, ten rates and three decays."""
        author: dict[str, Any] = {
            "steps": 10_000, "evaluate_every": 1_000, "weight_decays": (1e-2, 1e-3, 5e-2),
            "learning_rates": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        }  # fmt: skip
        return cls(protocol=protocol, **(author if protocol == "matchbench" else {}) | fields)

    def __post_init__(self) -> None:
        check_sweep(self)
        if not 0 < self.temperature < inf:
            raise ValueError(f"temperature is {self.temperature}, but must be positive")

    def probes(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of each probe."""
        return list(itertools.product(self.learning_rates, self.weight_decays))


def check_sweep(settings: Any) -> None:
    """ValueError, which starts with the field, for steps, learning rates or weight decays of probes out of range."""
    for name in ("steps", "batch", "evaluate_every"):
        if getattr(settings, name, 1) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}, but must be at least 1")
    if not settings.learning_rates or not all(0 < rate < inf for rate in settings.learning_rates):
        raise ValueError(f"learning_rates are {list(settings.learning_rates)}, but must be positive")
    if not settings.weight_decays or not all(0 <= decay < inf for decay in settings.weight_decays):
        raise ValueError(f"weight_decays are {list(settings.weight_decays)}, but must be at least 0")


def evaluate_matching(
    encoder: nn.Module, pairs: PairSet, train_pairs: PairSet, settings: ProbeSettings | None = None,
    size: int | None = None, choose_on_train: bool = False, cache: Path | None = None,
) -> Result:  # fmt: skip
    """Train linear probes on frozen features (`patch_features`), and score the best one.

    By the protocol "patches", features are normed, each training pair is used both ways, and the warps of patch centres
    are scored. By "matchbench", features are those before the last norm, pairs are used as listed, and every pixel of
    448 x 448 is scored.

    The best probe and its best evaluation are chosen on the test pairs, as in the paper, or with `choose_on_train` on
    every sixth training scene, which is left out of training. `cache` is a folder for features, see `prepare`.

    The result has "scores" and "per_pair_epe" of the best probe at its best evaluation, "best" which one that is,
    "probes" every evaluation of every probe. DataError: a set that cannot be read or does not fit the encoder, or too
    few training scenes to leave one out. FloatingPointError: every probe diverged.
    """
    settings, size = settings or ProbeSettings(), size or pairs.size
    device, matchbench = next(encoder.parameters()).device, settings.protocol == "matchbench"
    norm: Norm = "raw" if matchbench else "layernorm"

    def prepared(each: PairSet) -> Prepared:
        return prepare(encoder, each, size, (norm,), cache, scaled=not matchbench)[norm]

    test = prepared(pairs)
    left, chosen_on = leave_out(train_pairs) if choose_on_train else (train_pairs, pairs)
    train = prepared(left if matchbench else left.both_ways())
    choice = prepared(chosen_on) if choose_on_train else test
    scored = scored_points(test, settings.protocol)
    choice_scored = scored_points(choice, settings.protocol) if choose_on_train else scored
    history, (probe, evaluation), matrix = train_probes(train, choice, settings, device, choice_scored)
    warps = match_pairs(test, settings.batch, settings.temperature, device, matrix[None])[0]
    probes: list[dict[str, Any]] = [{"learning_rate": rate, "weight_decay": decay} for rate, decay in settings.probes()]
    best = {**probes[probe], "step": history[evaluation].step}
    for i, each in enumerate(probes):
        each["evaluations"] = [{"step": e.step, "train_loss": e.losses[i], **e.scores[i].as_dict()} for e in history]
    names = "steps", "batch", "evaluate_every", "temperature", "seed", "protocol"
    about = {
        "size": size,
        **{name: getattr(settings, name) for name in names},
        "train_set": train_pairs.name,
        "train_pairs": len(left.pairs),
    }
    about |= {"chosen_on": "left-out training scenes" if choose_on_train else "test pairs"}
    numbers = measured(warps, test.truth, scored) | {"best": best, "probes": probes, "settings": about}
    return Result(numbers, warps, size)


def leave_out(pairs: PairSet) -> tuple[PairSet, PairSet]:
    """The pairs of most scenes, and those of every sixth scene; DataError if there are fewer than six scenes."""
    kept, left = split_scenes(pairs.pairs, [pair.scene for pair in pairs.pairs], pairs.name)
    return replace(pairs, pairs=kept), replace(pairs, pairs=left)


def split_scenes(items: list[T], scenes: list[str], name: str) -> tuple[list[T], list[T]]:
    """The items of most scenes, and those of every sixth; errors as of `leave_out`, which name the set."""
    distinct = list(dict.fromkeys(scenes))
    if len(distinct) < EVERY:
        why = f"has {len(distinct)} scenes to train on; {EVERY} are needed to choose on them"
        raise DataError(f"'{name}' {why}, or --choose-on test")
    out = set(distinct[::EVERY])
    kept, left = (
        [item for item, scene in zip(items, scenes, strict=True) if (scene in out) == is_out]
        for is_out in (False, True)
    )
    return kept, left


def evaluate_discriminant(
    encoder: nn.Module, pairs: PairSet, train_pairs: PairSet, size: int | None = None, temperature: float = TEMPERATURE,
    cache: Path | None = None,
) -> Result:  # fmt: skip
    """Score the probe `discriminant` of the training pairs: seconds, and no learning rate to choose.

    DataError: a set that cannot be read or does not fit the encoder.
    """
    size, device = size or pairs.size, next(encoder.parameters()).device
    test = prepare(encoder, pairs, size, ("layernorm",), cache)["layernorm"]
    train = prepare(encoder, train_pairs, size, ("layernorm",), cache)["layernorm"]
    warps = match_pairs(test, BATCH, temperature, device, discriminant(train, device)[None])[0]
    about = {"size": size, "temperature": temperature, "shrinkage": SHRINKAGE, "protocol": "patches"}
    trained = {"train_set": train_pairs.name, "train_pairs": len(train_pairs.pairs)}
    return Result(measured(warps, test.truth) | {"settings": about | trained}, warps, size)


def discriminant(train: Prepared, device: torch.device, shrinkage: float = SHRINKAGE) -> Tensor:
    """The linear discriminant of true matches (D, D) float32, with which the covariance of differences is the identity.

    The covariance is first moved by `shrinkage` towards a multiple of the identity. The direction of the mean feature,
    which all patches share, is removed.
    """
    width = train.features.shape[-1]
    covariance, count = torch.zeros(width, width, dtype=torch.float64, device=device), 0
    for pairs in torch.arange(len(train.first)).split(BATCH):
        a, b = train.of(pairs, device)
        target = nearest_patch(train.truth.target[pairs], train.truth.grid).to(device)
        matched = b.gather(1, target[..., None].expand_as(a))
        difference = (a - matched)[train.truth.visible[pairs].to(device)].double()
        covariance += difference.T @ difference
        count += len(difference)
    covariance /= count
    covariance = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / width * torch.eye(width).to(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    probe = vectors * values.rsqrt()
    shared = F.normalize(train.features.double().mean((0, 1)).to(device) @ probe, dim=0)
    return (probe - torch.outer(probe @ shared, shared)).float()


def evaluate_cosine(
    encoder: nn.Module, pairs: PairSet, size: int | None = None, temperature: float = TEMPERATURE,
    cache: Path | None = None, protocol: Protocol = "patches",
) -> Result:  # fmt: skip
    """Score matching by cosine similarity, with and without the encoder's last LayerNorm, as Siméoni et al. do.

    Sets of scenes are scored by dense warps at the points of the protocol, see `evaluate_matching`, sets of objects by
    Probe3D's recall. `size` defaults to that of the set.
    The result has "layernorm" and "raw" with the "scores" of each, "best" the better one, and its "scores".
    DataError: a set that cannot be read or does not fit the encoder.
    """
    size = size or pairs.size
    if pairs.objects:
        if protocol != "patches":  # it would be another result of the same numbers
            raise DataError(f"--protocol {protocol} scores warps, but of '{pairs.name}' recall is scored: leave it out")
        recalls = object_recall(encoder, pairs, size)
        variants: dict[str, Any] = {norm: {"scores": found} for norm, found in recalls.items()}
        best = max(NORMS, key=lambda norm: recalls[norm]["recall"])
        return Result({**variants, "best": best, "settings": {"size": size}, **variants[best]}, None, size)
    device = next(encoder.parameters()).device
    prepared = prepare(encoder, pairs, size, cache=cache)
    warps = {norm: match_pairs(data, BATCH, temperature, device) for norm, data in prepared.items()}
    truth = prepared["raw"].truth
    scored = scored_points(prepared["raw"], protocol)
    found = {norm: measured(warps[norm], truth, scored) for norm in prepared}
    best = min(NORMS, key=lambda norm: found[norm]["scores"]["epe"])
    by_norm: dict[str, Any] = {norm: {"scores": found[norm]["scores"]} for norm in NORMS}
    settings = {"size": size, "temperature": temperature, "protocol": protocol}
    return Result({**by_norm, "best": best, "settings": settings, **found[best]}, warps[best], size)


def cosine_logits(a: Tensor, b: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Cosine similarity over the temperature: (..., P_a, D) and (..., P_b, D) -> (..., P_a, P_b)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT / temperature


def decode(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """Warp (..., P_a, 2), unit coordinates in B, from logits (..., P_a, P_b) over the patches of B, row by row."""
    rows, columns = grid
    best = logits.argmax(-1)
    shifts = torch.tensor(TAPS, device=logits.device)
    row, column = best[..., None] // columns + shifts[:, 0], best[..., None] % columns + shifts[:, 1]
    outside = (row < 0) | (row >= rows) | (column < 0) | (column >= columns)
    taps = row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)
    weights = logits.gather(-1, taps).masked_fill(outside, -torch.inf).softmax(-1)
    return (weights[..., None] * grid_points(rows, columns).to(logits)[taps]).sum(-2)


def nearest_patch(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """Index of the patch that contains each point (..., 2), int64; points outside are clamped to the border."""
    rows, columns = grid
    sides = torch.tensor([columns, rows], device=points.device)
    cell = (points * sides).floor().long().clamp(min=0).minimum(sides - 1)
    return cell[..., 1] * columns + cell[..., 0]


@torch.no_grad()
def match_pairs(
    data: Prepared, batch: int, temperature: float, device: torch.device, stack: Tensor | None = None
) -> Tensor:
    """Warps (N, P, 2) of all pairs by their features, or (Q, N, P, 2) by each probe of a stack, on the CPU."""
    warps = []
    for pairs in torch.arange(len(data.first)).split(batch):
        a, b = (each if stack is None else project(stack, each) for each in data.of(pairs, device))
        warps.append(decode(cosine_logits(a, b, temperature), data.truth.grid).cpu())
    return torch.cat(warps, dim=-3)


class Evaluated(NamedTuple):
    """An evaluation of all probes."""

    step: int
    losses: list[float]  # training losses, means since the last evaluation
    scores: list[MatchScores]


class Trained(NamedTuple):
    """Trained probes; the best has the least end-point error at any evaluation."""

    history: list[Evaluated]
    best: tuple[int, int]  # indices of the probe and of the evaluation
    matrix: Tensor  # (D, D) that probe at that evaluation, (D + 1, D) if it has a bias


def train_probes(
    train: Prepared, choice: Prepared, settings: ProbeSettings, device: torch.device, scored: Truth | None = None
) -> Trained:
    """Train all probes in one pass and keep the best on `choice`, of which the points `scored` count.

    They start as the identity, which is cosine matching. Those of matchbench have a bias and start as PyTorch's linear
    layers; the loss is their mean, and their gradients are clipped together.

    FloatingPointError: no probe gave a finite warp at any evaluation.
    """
    probes, width, steps = settings.probes(), train.features.shape[-1], settings.steps
    scored, matchbench = scored or choice.truth, settings.protocol == "matchbench"
    if matchbench:
        rng, bound = torch.Generator().manual_seed(settings.seed), width**-0.5
        stack = (2 * torch.rand(len(probes), width + 1, width, generator=rng) - 1).mul(bound).to(device)
    else:
        stack = torch.eye(width, device=device).repeat(len(probes), 1, 1)
    # Views: the optimizer updates the stack. Biases are not decayed, and have the same learning rate.
    views, scale = [part for each in stack for part in each.split(width)], settings.batch / 8 if matchbench else 1.0
    rates = [(lr * scale, decay) for lr, wd in probes for decay in (wd, 0.0)[: len(views) // len(probes)]]
    groups = [{"params": [each], "lr": lr, "weight_decay": wd} for each, (lr, wd) in zip(views, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    history: list[Evaluated] = []
    best, least, kept = (0, 0), inf, stack[0]
    total, since = torch.zeros(len(probes), device=device), 0
    bar = progress_bar(_draw(train, settings), desc=f"{len(probes)} probes", unit="step", total=steps)
    for step, pairs in enumerate(bar, 1):
        leaf = stack.detach().requires_grad_()
        a, b = (project(leaf, each) for each in train.of(pairs, device))
        target = nearest_patch(train.truth.target[pairs], train.truth.grid).to(device)
        logits, visible = cosine_logits(a, b, settings.temperature), train.truth.visible[pairs].to(device)
        losses = matching_losses(logits, target, visible)
        (gradient,) = torch.autograd.grad(losses.mean() if matchbench else losses.sum(), leaf)
        if matchbench:
            norm = gradient.norm()  # steps with an infinite one are skipped, as the author's loss scaler does
            gradient = torch.where(norm.isfinite(), gradient * (CLIP / (norm + 1e-6)).clamp(max=1), 0)
        for view, part in zip(views, (part for each in gradient for part in each.split(width)), strict=True):
            view.grad = part
        optimizer.step()
        if matchbench and step == int(DECAY_AT * steps):
            for group in optimizer.param_groups:
                group["lr"] *= DECAY
        total, since = total + losses.detach(), since + 1
        if step % settings.evaluate_every and step < steps:
            continue
        warps = match_pairs(choice, settings.batch, settings.temperature, device, stack)
        found, _ = score_warps(warps, choice.truth.grid, scored, device)
        history.append(Evaluated(step, (total / since).tolist(), found))
        probe = min(range(len(found)), key=lambda i: found[i].epe if isfinite(found[i].epe) else inf)
        if found[probe].epe < least:
            best, least, kept = (probe, len(history) - 1), found[probe].epe, stack[probe].clone()
        total, since = torch.zeros_like(total), 0
        bar.set_postfix(epe=f"{found[probe].epe:.2f}", best=f"{least:.2f}", refresh=False)
    if least == inf:
        raise FloatingPointError("all probes diverged: lower the learning rates")
    return Trained(history, best, kept)


def matching_losses(logits: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """Negative log-likelihood of the target patches, mean over the visible points.

    logits (..., B, P, P'), target (B, P) int64, visible (B, P) bool -> (...).
    """
    likelihood = logits.log_softmax(-1).gather(-1, target.expand(logits.shape[:-1])[..., None])[..., 0]
    return -torch.where(visible, likelihood, 0).sum((-2, -1)) / visible.sum()


def project(stack: Tensor, features: Tensor) -> Tensor:
    """Features (B, P, D) times every probe (Q, D, D) -> (Q, B, P, D); row D of (Q, D + 1, D) is a bias."""
    matrices, bias = stack.split([features.shape[-1], stack.shape[1] - features.shape[-1]], dim=1)
    return (features.flatten(0, 1) @ matrices + bias.sum(1, keepdim=True)).unflatten(1, features.shape[:2])


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
