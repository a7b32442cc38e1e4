"""What an evaluation gives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmum.evaluate.features import Truth
from fastmum.geometry.metrics import match_errors, match_scores, pair_epe
from fastmum.geometry.warp import grid_points


class Result(NamedTuple):
    """What an evaluation gives.

    Args:
        numbers: for JSON; "scores" are those of the table, "no_motion" those of a warp that leaves everything in place.
        warps: (N, P, 2) estimated at the patch centres of every pair's first frame, unit coordinates; None where the
            evaluation estimates none.
        size: side of the pictures in pixels.
    """

    numbers: dict[str, Any]
    warps: Tensor | None
    size: int


def measured(warps: Tensor, truth: Truth) -> dict[str, Any]:
    """Scores of warps (N, P, 2) over a set, those of no motion at all, and the end-point error of each pair."""
    still = grid_points(*truth.grid).expand_as(truth.target)
    errors, errors_still = (match_errors(points, truth.target) for points in (warps, still))
    found, found_still = match_scores(torch.stack([errors, errors_still]), truth.visible)
    names = [pair.name for pair in truth.pairs.pairs]
    return {
        "scores": found.as_dict(),
        "no_motion": found_still.as_dict(),
        "per_pair_epe": dict(zip(names, pair_epe(errors, truth.visible), strict=True)),
        "visible_share": truth.visible.double().mean().item(),
    }
