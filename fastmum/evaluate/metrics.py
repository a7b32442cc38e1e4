"""How far estimated warps are from the true ones.

Errors are pixels of pictures of 448 x 448, whatever size was computed at (RoMa). Every pair counts alike: the mean goes
over a pair's visible points, then over pairs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

STANDARD = 448  # pixels a side that errors are expressed in
ROBUST = 32.0  # pixels below which a match counts as robust
PCK = (1.0, 3.0, 5.0)  # pixels below which a key point is correct


@dataclass(frozen=True)
class Scores:
    """Quality of the warps of a set.

    Args:
        epe: mean end-point error, pixels.
        robustness: percentage of points with an error below 32 pixels.
        pck1, pck3, pck5: percentage of points with an error below 1, 3 and 5 pixels.
        pairs: pairs with a visible point, over which the means go.
    """

    epe: float
    robustness: float
    pck1: float
    pck3: float
    pck5: float
    pairs: int

    def as_dict(self) -> dict[str, float | None]:
        """The same for JSON, which has no numbers that are not finite."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def pixel_errors(estimated: Tensor, true: Tensor) -> Tensor:
    """Distances of points (..., 2) in unit coordinates, in pixels of 448 x 448, float64."""
    return STANDARD * (estimated.double() - true.double()).norm(dim=-1)


def mean_of_visible(values: Tensor, visible: Tensor) -> Tensor:
    """Means over each pair's visible points, (..., N, P) and (N, P) bool -> (..., N); NaN where none is visible."""
    return torch.where(visible, values, 0).sum(-1) / visible.sum(-1)


def scores(errors: Tensor, visible: Tensor) -> list[Scores]:
    """Scores of several matchers on the same pairs.

    Args:
        errors: (Q, N, P) pixels: Q matchers, N pairs, P points.
        visible: (N, P) bool, which points count.

    Returns:
        Q scores; those of a warp that is not finite have an end-point error that is not.

    Raises:
        ValueError: no point is visible in any pair.
    """
    if not visible.any():
        raise ValueError("no point is visible in both views of any pair, so there is nothing to measure")
    counted = visible.any(-1)
    shares = [errors, *(100.0 * (errors < bound) for bound in (ROBUST, *PCK))]
    columns = [mean_of_visible(each, visible)[:, counted].mean(-1).tolist() for each in shares]
    return [Scores(*row, pairs=int(counted.sum())) for row in zip(*columns, strict=True)]


def pair_epe(errors: Tensor, visible: Tensor) -> list[float | None]:
    """The end-point error of each pair, (N, P) and (N, P) bool; None where no point is visible."""
    return [None if mean != mean else mean for mean in mean_of_visible(errors, visible).tolist()]
