"""Matching by cosine similarity of features, nothing trained (Table 13; supplement, section C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmum.evaluate.features import NORMS, Prepared, prepare
from fastmum.evaluate.matcher import TEMPERATURE, cosine_logits, decode
from fastmum.evaluate.pairs import PairSet
from fastmum.evaluate.recall import object_recall
from fastmum.evaluate.result import Result, measured

BATCH = 8  # pairs matched at a time


def evaluate_cosine(
    encoder: nn.Module,
    pairs: PairSet,
    size: int | None = None,
    temperature: float = TEMPERATURE,
    progress: bool = True,
) -> Result:
    """Score matching by cosine similarity with and without the encoder's last LayerNorm, as Siméoni et al. do.

    Sets of scenes are scored by their dense warps, sets of objects by Probe3D's recall.

    Args:
        encoder: see `patch_features`; on the device that everything is computed on.
        pairs: to test on.
        size: side of the pictures in pixels; None: the set's own.
        temperature: of the matcher.
        progress: whether to show bars.

    Returns:
        "layernorm" and "raw" with the "scores" of each, "best" which is better, and "scores" of that one.

    Raises:
        DataError: a set that cannot be read or does not fit the encoder.
    """
    size = size or pairs.size
    if pairs.objects:
        recalls = object_recall(encoder, pairs, size, progress)
        variants = {norm: {"scores": scores} for norm, scores in recalls.items()}
        best = max(NORMS, key=lambda norm: variants[norm]["scores"]["recall"])
        return Result(variants | {"best": best, "settings": {"size": size}} | variants[best], None, size)
    device = next(encoder.parameters()).device
    warps, variants = {}, {}
    for norm, data in prepare(encoder, pairs, size, progress=progress).items():
        warps[norm] = cosine_warps(data, temperature, device)
        variants[norm] = measured(warps[norm], data.truth)
    best = min(NORMS, key=lambda norm: variants[norm]["scores"]["epe"])
    scores = {norm: {"scores": variants[norm]["scores"]} for norm in NORMS}
    numbers = scores | {"best": best, "settings": {"size": size, "temperature": temperature}} | variants[best]
    return Result(numbers, warps[best], size)


@torch.no_grad()
def cosine_warps(data: Prepared, temperature: float, device: torch.device) -> Tensor:
    """Warps of all pairs by their features alone, (N, P, 2) unit coordinates, on the CPU."""
    warps = [
        decode(cosine_logits(*data.of(numbers, device), temperature), data.truth.grid).cpu()
        for numbers in data.batches(BATCH)
    ]
    return torch.cat(warps)
