"""Accuracy of relative poses: errors in degrees, and the area under their recall."""

from typing import NamedTuple

import numpy as np

from fastmum.geometry.metrics import direction_error, pose_auc, rotation_error

DEGREES = (5, 10, 20)  # of the AUC
WORST = 180.0  # degrees, the error of a pose that is not finite, or whose translation is 0


class Errors(NamedTuple):
    """Degrees, (n,) float64 each."""

    rotation: np.ndarray
    direction: np.ndarray  # of translation, not folded (Reloc3r)


def errors_of(R: np.ndarray, t: np.ndarray, R_true: np.ndarray, t_true: np.ndarray) -> Errors:
    """Errors of rotations (n, 3, 3) and translations (n, 3) of any length."""
    finite = np.isfinite(R).all((-2, -1)) & np.isfinite(t).all(-1)
    rotation = rotation_error(np.where(finite[:, None, None], R, np.eye(3)), R_true)
    direction = direction_error(np.where(finite[:, None], t, 0.0), t_true)
    return Errors(np.where(finite, rotation, WORST), np.nan_to_num(direction, nan=WORST))


def scores_of(errors: Errors) -> dict[str, float]:
    """`auc5`, `auc10`, `auc20` in [0, 1] of the larger error of each pair; medians of both errors in degrees."""
    areas = pose_auc(np.maximum(*errors), DEGREES)
    scores = dict(zip((f"auc{t}" for t in DEGREES), areas, strict=True))
    medians = {f"{name}_median": float(np.median(e)) for name, e in zip(errors._fields, errors, strict=True)}
    return scores | medians
