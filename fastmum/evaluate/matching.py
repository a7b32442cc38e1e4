"""Dense matching by linear probes and by cosine similarity (Tables 4 and 13; supplement, sections B and C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmum.evaluate.features import NORMS, Prepared, Truth, prepare
from fastmum.evaluate.matcher import TEMPERATURE, cosine_logits, decode
from fastmum.evaluate.pairs import PairSet
from fastmum.evaluate.probe import ProbeSettings, train_probes
from fastmum.evaluate.recall import object_recall
from fastmum.geometry.metrics import match_errors, match_scores, pair_epe
from fastmum.geometry.warp import grid_points

BATCH = 8  # pairs matched at once


class Result(NamedTuple):
    """The result of an evaluation."""

    numbers: dict[str, Any]  # for JSON; "scores" are those of the table, "no_motion" those of the identity warp
    warps: Tensor | None  # (N, P, 2) unit coordinates of the patch centres of A in B, if they are estimated
    size: int  # side of the pictures in pixels
    targets: Sequence[Any] = ()  # the `Target`s that `evaluate_views` measured


def measured(warps: Tensor, truth: Truth) -> dict[str, Any]:
    """Scores of warps (N, P, 2) and of the identity warp, and the end-point error of each pair."""
    identity = grid_points(*truth.grid).expand_as(truth.target)
    errors, errors_identity = (match_errors(points, truth.target) for points in (warps, identity))
    found, found_identity = match_scores(torch.stack([errors, errors_identity]), truth.visible)
    names = [pair.name for pair in truth.pairs.pairs]
    return {
        "scores": found.as_dict(),
        "no_motion": found_identity.as_dict(),
        "per_pair_epe": dict(zip(names, pair_epe(errors, truth.visible), strict=True)),
        "visible_share": truth.visible.double().mean().item(),
    }


def evaluate_matching(
    encoder: nn.Module,
    pairs: PairSet,
    train_pairs: PairSet,
    settings: ProbeSettings | None = None,
    size: int | None = None,
    progress: bool = True,
) -> Result:
    """Train linear probes on frozen features and score the best one.

    Args:
        encoder: see `patch_features`; its device computes everything.
        pairs: test set.
        train_pairs: training set; every pair is used in both directions.
        size: side of the pictures in pixels; None: the test set's default.

    Returns:
        "scores" and "per_pair_epe" of the best probe at its best evaluation, "best" which one that is, "probes" every
        evaluation of every probe.

    Raises:
        DataError: a set that cannot be read or does not fit the encoder.
        FloatingPointError: every probe diverged.
    """
    settings, size = settings or ProbeSettings(), size or pairs.size
    device = next(encoder.parameters()).device
    test = prepare(encoder, pairs, size, ("layernorm",), progress)["layernorm"]
    train = prepare(encoder, train_pairs.both_ways(), size, ("layernorm",), progress)["layernorm"]
    trained = train_probes(train, test, settings, device, progress)
    probe, evaluation = trained.best
    probes: list[dict[str, Any]] = [{"learning_rate": rate, "weight_decay": decay} for rate, decay in settings.probes()]
    best = {**probes[probe], "step": trained.history[evaluation].step}
    for i, each in enumerate(probes):
        each["evaluations"] = [
            {"step": e.step, "train_loss": e.losses[i], **e.scores[i].as_dict()} for e in trained.history
        ]
    about = {name: getattr(settings, name) for name in ("steps", "batch", "evaluate_every", "temperature", "seed")}
    about = {"size": size, **about, "train_set": train_pairs.name, "train_pairs": len(train_pairs.pairs)}
    numbers = measured(trained.warps, test.truth) | {"best": best, "probes": probes, "settings": about}
    return Result(numbers, trained.warps, size)


def evaluate_cosine(
    encoder: nn.Module,
    pairs: PairSet,
    size: int | None = None,
    temperature: float = TEMPERATURE,
    progress: bool = True,
) -> Result:
    """Score matching by cosine similarity, with and without the encoder's last LayerNorm, as Siméoni et al. do.

    Sets of scenes are scored by dense warps, sets of objects by Probe3D's recall.

    Args:
        encoder: see `patch_features`; its device computes everything.
        size: side of the pictures in pixels; None: the set's default.
        temperature: of the matcher.

    Returns:
        "layernorm" and "raw" with the "scores" of each, "best" the better one, and its "scores".

    Raises:
        DataError: a set that cannot be read or does not fit the encoder.
    """
    size = size or pairs.size
    if pairs.objects:
        recalls = object_recall(encoder, pairs, size, progress)
        variants: dict[str, Any] = {norm: {"scores": found} for norm, found in recalls.items()}
        best = max(NORMS, key=lambda norm: recalls[norm]["recall"])
        return Result({**variants, "best": best, "settings": {"size": size}, **variants[best]}, None, size)
    device = next(encoder.parameters()).device
    prepared = prepare(encoder, pairs, size, progress=progress)
    warps = {norm: cosine_warps(data, temperature, device) for norm, data in prepared.items()}
    found = {norm: measured(warps[norm], data.truth) for norm, data in prepared.items()}
    best = min(NORMS, key=lambda norm: found[norm]["scores"]["epe"])
    by_norm: dict[str, Any] = {norm: {"scores": found[norm]["scores"]} for norm in NORMS}
    settings = {"size": size, "temperature": temperature}
    return Result({**by_norm, "best": best, "settings": settings, **found[best]}, warps[best], size)


@torch.no_grad()
def cosine_warps(data: Prepared, temperature: float, device: torch.device) -> Tensor:
    """Warps of all pairs by cosine similarity of their features, (N, P, 2) unit coordinates, on the CPU."""
    batches = torch.arange(len(data.first)).split(BATCH)
    return torch.cat(
        [decode(cosine_logits(*data.of(ids, device), temperature), data.truth.grid).cpu() for ids in batches]
    )
