"""Scores of warps at the points of a protocol: patch centres, or every pixel as MuM's author has published it since.

Legend: Q matchers, N pairs, P patches of a frame.
"""

from dataclasses import astuple, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmum.evaluate.features import Prepared, Truth, true_warps
from fastmum.geometry.metrics import STANDARD, MatchScores, match_errors, match_scores, pair_epe
from fastmum.geometry.warp import grid_points

Protocol = Literal["patches", "matchbench"]
BATCH = 8  # pairs matched at once by cosine similarity, and averaged by matchbench


def measured(warps: Tensor, truth: Truth, scored: Truth | None = None) -> dict[str, Any]:
    """Scores of warps (N, P, 2) of the grid of `truth` and of the identity warp at the points `scored`; pairs' errors.

    `scored` is by default `truth`, see `scored_points`.
    """
    scored = scored or truth
    both = torch.stack([warps.double(), grid_points(*truth.grid).expand(warps.shape)])
    (found, identity), by_pair = score_warps(both, truth.grid, scored, warps.device)
    return {
        "scores": found.as_dict(),
        "no_motion": identity.as_dict(),
        "per_pair_epe": {pair.name: error for pair, error in zip(truth.pairs.pairs, by_pair, strict=True)},
        "visible_share": scored.visible.double().mean().item(),
    }


def scored_points(data: Prepared, protocol: Protocol) -> Truth:
    """The true warps that a protocol scores: of patch centres, or of all pixels of 448 x 448, 1.8 MB a pair."""
    return true_warps(data.truth.pairs, STANDARD, torch.float32) if protocol == "matchbench" else data.truth


def score_warps(
    warps: Tensor, grid: tuple[int, int], truth: Truth, device: torch.device
) -> tuple[list[MatchScores], list[float | None]]:
    """Scores of warps (Q, N, P, 2) of a grid, and the end-point error of each pair by the first of them.

    If `truth` is that of pixels, warps are interpolated bilinearly, and scores are means over the visible pixels of 8
    pairs in random order, then over these batches, as matchbench has them. Else see `match_scores`.
    """
    if truth.grid == grid:
        errors = match_errors(warps, truth.target)
        return match_scores(errors, truth.visible), pair_epe(errors[0], truth.visible)
    by_pair: list[float | None] = [None] * len(truth.visible)
    found: list[list[MatchScores]] = [[] for _ in warps]
    order = torch.randperm(len(truth.visible), generator=torch.Generator().manual_seed(0))
    for pairs in order[truth.visible.any(-1)[order]].split(BATCH):
        visible = truth.visible[pairs].to(device)
        target, every = truth.target[pairs].to(device)[visible], visible.new_ones(1, int(visible.sum()))
        for i, each in enumerate(warps):
            maps = each[pairs].to(device, torch.float32).mT.unflatten(2, grid)
            fine = F.interpolate(maps, truth.grid, mode="bilinear", align_corners=False).flatten(2).mT
            errors = match_errors(fine[visible], target)
            found[i] += match_scores(errors[None, None], every)
            if i == 0:
                for pair, own in zip(pairs.tolist(), errors.split(visible.sum(1).tolist()), strict=True):
                    by_pair[pair] = own.mean().item()
    seen, scores = int(truth.visible.any(-1).sum()), []
    for each in found:
        means = [sum(values) / len(values) for values in zip(*map(astuple, each), strict=True)]
        scores.append(replace(MatchScores(*means), pairs=seen))
    return scores, by_pair
