"""What an evaluation gives."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastmum.evaluate.features import Prepared
from fastmum.evaluate.metrics import pair_epe, pixel_errors, scores


class Result(NamedTuple):
    """What an evaluation gives.

    Args:
        numbers: for JSON; "scores" are those of the table.
        warps: (N, P, 2) estimated at the patch centres of every pair's first frame, unit coordinates; None where the
            evaluation estimates none.
        size: side of the pictures in pixels.
    """

    numbers: dict[str, Any]
    warps: Tensor | None
    size: int


def measured(warps: Tensor, data: Prepared) -> dict[str, Any]:
    """Scores of warps (N, P, 2) over a set, and the end-point error of each of its pairs."""
    errors = pixel_errors(warps, data.target)
    names = [pair.name for pair in data.pairs.pairs]
    return {
        "scores": scores(errors[None], data.visible)[0].as_dict(),
        "per_pair_epe": dict(zip(names, pair_epe(errors, data.visible), strict=True)),
        "visible_share": data.visible.double().mean().item(),
    }
