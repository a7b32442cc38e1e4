"""Metrics of relative pose, depth, point clouds, matching, and any-match classification.

Arrays are NumPy, float64 inside; the matching metrics are torch, since evaluations score many matchers at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.integrate import trapezoid
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from fastmum.geometry.camera import quaternion, rigid_inverse

DepthCrop = Literal["eigen", "garg"]
CROPS: dict[DepthCrop | None, Callable[[int, int], tuple[float, float, float, float]]] = {  # top, bottom, left, right
    "eigen": lambda height, width: (45, 471, 41, 601),  # of 480 x 640
    "garg": lambda height, width: (0.40810811 * height, 0.99189189 * height, 0.03594771 * width, 0.96405229 * width),
    None: lambda height, width: (0, height, 0, width),
}  # fmt: skip
DEPTH_METRICS = ("a1", "a2", "a3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log_10", "silog")
STANDARD = 448  # side of the image in pixels that match errors are expressed in, whatever size was computed at (RoMa)
ROBUST = 32.0  # pixels below which a match counts as robust
BLOCK = 1 << 16  # points whose normals are estimated at once
PCK = (1.0, 3.0, 5.0)  # pixels below which a key point is correct


def rotation_error(R: np.ndarray, R_true: np.ndarray) -> np.ndarray:
    """Angle of R^T R_true, degrees (...), for rotations (..., 3, 3); accurate near 0 and 180 (Reloc3r, RoMa)."""
    D = np.swapaxes(R, -1, -2).astype(np.float64) @ R_true
    return np.degrees(Rotation.from_matrix(D.reshape(-1, 3, 3)).magnitude()).reshape(D.shape[:-2])


def rotation_error_quaternion(R: np.ndarray, R_true: np.ndarray) -> np.ndarray:
    """The same by quaternions (VGGT); at least 4e-6 degrees, and other digits for rotations in float32."""
    cosine = (quaternion(R) * quaternion(R_true)).sum(-1)
    return np.degrees(np.arccos(1 - 2 * np.maximum(1 - cosine**2, 1e-15)))


def direction_error(t: np.ndarray, t_true: np.ndarray, folded: bool = False) -> np.ndarray:
    """Angle between translation directions (..., 3), degrees (...); NaN for a zero translation.

    If `folded`, opposite directions count as equal (VGGT, RoMa: an essential matrix has no sign).
    """
    a, b = t.astype(np.float64), t_true.astype(np.float64)
    dot, cross = (a * b).sum(-1), np.linalg.norm(np.cross(a, b), axis=-1)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where(lengths > 0, np.degrees(np.arctan2(cross, np.abs(dot) if folded else dot)), np.nan)


def pair_poses(camera_from_world: np.ndarray) -> np.ndarray:
    """VGGT's relative poses P_i P_j^-1 of all pairs i < j in lexical order, (N, 4, 4) -> (N (N - 1) / 2, 4, 4)."""
    i, j = np.triu_indices(len(camera_from_world), 1)
    return camera_from_world[i] @ rigid_inverse(camera_from_world[j])


def pose_auc(errors: np.ndarray, thresholds: Sequence[float]) -> list[float]:
    """Area in [0, 1] under the recall curve up to each threshold by the trapezoid rule (SuperGlue, RoMa, Reloc3r).

    `errors` (N,) are the max of rotation and direction error in degrees; NaN counts as above every threshold.
    """
    sorted_errors = np.sort(np.concatenate([[0.0], np.nan_to_num(errors.astype(np.float64), nan=np.inf)]))
    recall = np.linspace(0, 1, len(sorted_errors))
    areas = []
    for t in thresholds:
        last = np.searchsorted(sorted_errors, t)
        y, x = np.append(recall[:last], recall[last - 1]), np.append(sorted_errors[:last], t)
        areas.append(float(trapezoid(y, x) / t))
    return areas


def pose_auc_histogram(errors: np.ndarray, thresholds: Sequence[int]) -> list[float]:
    """Mean over 1, 2, ..., t degrees of the share of errors below (VGGT), as in `pose_auc`; the last bin includes t."""
    errors = np.nan_to_num(errors.astype(np.float64), nan=np.inf)
    counts = (np.histogram(errors[errors <= t], np.arange(t + 1))[0] for t in thresholds)
    return [float((np.cumsum(each) / len(errors)).mean()) for each in counts]


def depth_metrics(
    depth: np.ndarray, true: np.ndarray, max_depth: float, min_depth: float = 1e-3, crop: DepthCrop | None = None
) -> dict[str, float]:
    """Metrics of one depth map (H, W) over the pixels with min_depth < true < max_depth.

    Predictions are clipped to [min_depth, max_depth], the latter 10 for NYU and 80 for KITTI; those that are NaN count
    as infinite, and so do the errors of their image (its silog is NaN). `true` is 0 where it is unknown. `crop` is the
    part that counts: Eigen's of NYU, Garg's shares of KITTI's sides; None: everything.

    Returns `DEPTH_METRICS`: a1 to a3 are the shares of ratios below 1.25, its square and cube, silog is times 100. All
    are NaN without valid pixels.
    """
    top, bottom, left, right = CROPS[crop](*true.shape)
    depth, true = (x[int(top) : int(bottom), int(left) : int(right)].astype(np.float64) for x in (depth, true))
    valid = (true > min_depth) & (true < max_depth)
    if not valid.any():
        return dict.fromkeys(DEPTH_METRICS, math.nan)
    p, g = depth[valid].clip(min_depth, max_depth), true[valid]
    p[np.isnan(p)] = np.inf
    ratio, error, log_error = np.maximum(p / g, g / p), p - g, np.log(p) - np.log(g)
    shares = [(ratio < 1.25**power).mean() for power in (1, 2, 3)]
    relative = (np.abs(error) / g).mean(), (error**2 / g).mean()
    rmse, rmse_log = (np.sqrt((each**2).mean()) for each in (error, log_error))
    with np.errstate(invalid="ignore"):  # inf - inf
        logarithmic = np.abs(log_error).mean() / math.log(10), 100 * log_error.std()
    values = (*shares, *relative, rmse, rmse_log, *logarithmic)
    return dict(zip(DEPTH_METRICS, map(float, values), strict=True))


def mean_metrics(images: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric of `depth_metrics` over the images with valid pixels; NaN if there are none."""
    valid = [image for image in images if not math.isnan(image["rmse"])]
    return {name: float(np.mean([image[name] for image in valid])) if valid else math.nan for name in images[0]}


def estimate_normals(points: np.ndarray, neighbours: int = 30) -> np.ndarray:
    """Normals (N, 3) by PCA over the nearest points, the point itself included; their sign is arbitrary."""
    tree, normals = cKDTree(points), np.empty((len(points), 3))
    for first in range(0, len(points), BLOCK):
        part = slice(first, first + BLOCK)
        near = points[tree.query(points[part], k=min(neighbours, len(points)))[1]].astype(np.float64)
        centred = near - near.mean(1, keepdims=True)
        normals[part] = np.linalg.eigh(np.swapaxes(centred, 1, 2) @ centred)[1][..., 0]
    return normals


def point_metrics(
    points: np.ndarray, true: np.ndarray, normals: np.ndarray | None = None, true_normals: np.ndarray | None = None
) -> dict[str, float]:
    """Accuracy, completeness and normal consistency of a point cloud.

    `points` (N, 3) and `true` (M, 3) are aligned; normals are unit vectors of the same shapes. "acc_mean", "acc_median"
    are the distance of points to the nearest true point; "comp_mean", "comp_median" the reverse; with normals "nc1_*"
    and "nc2_*" are |cos| between the normals of those pairs.
    """
    (accuracy, to_true), (completeness, to_points) = cKDTree(true).query(points), cKDTree(points).query(true)
    values = {"acc": accuracy, "comp": completeness}
    if normals is not None and true_normals is not None:
        values["nc1"] = np.abs((normals * true_normals[to_true]).sum(-1))
        values["nc2"] = np.abs((true_normals * normals[to_points]).sum(-1))
    statistics: dict[str, Any] = {"mean": np.mean, "median": np.median}
    return {f"{name}_{key}": float(f(each)) for name, each in values.items() for key, f in statistics.items()}


@dataclass(frozen=True)
class MatchScores:
    """Quality of the warps of a set: means over each pair's visible points, then over pairs."""

    epe: float  # mean end-point error, pixels
    robustness: float  # percentage of points with an error below 32 pixels
    pck1: float  # below 1 pixel
    pck3: float
    pck5: float
    pairs: int  # with a visible point

    def as_dict(self) -> dict[str, float | None]:
        """For JSON: None for values that are not finite."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def match_errors(estimated: Tensor, true: Tensor) -> Tensor:
    """Distances of points (..., 2) in normalised image coordinates, in pixels of 448 x 448, float64 (...)."""
    return STANDARD * (estimated.double() - true.double()).norm(dim=-1)


def mean_of_visible(values: Tensor, visible: Tensor) -> Tensor:
    """Means over each pair's visible points, (..., N, P) and (N, P) bool -> (..., N); NaN where none is visible."""
    return torch.where(visible, values, 0).sum(-1) / visible.sum(-1)


def match_scores(errors: Tensor, visible: Tensor) -> list[MatchScores]:
    """Scores of Q matchers on the same N pairs from errors (Q, N, P) in pixels, over the `visible` points (N, P) bool.

    A warp that is not finite has an end-point error that is not finite. ValueError if no point is visible.
    """
    if not visible.any():
        raise ValueError("no point is visible in both views of any pair, so there is nothing to measure")
    counted = visible.any(-1)
    shares = [errors, *(100.0 * (errors < bound) for bound in (ROBUST, *PCK))]
    columns = [mean_of_visible(each, visible)[:, counted].mean(-1).tolist() for each in shares]
    return [MatchScores(*row) for row in zip(*columns, [int(counted.sum())] * len(errors), strict=True)]


def pair_epe(errors: Tensor, visible: Tensor) -> list[float | None]:
    """End-point error of each pair, from (N, P) and (N, P) bool; None where no point is visible."""
    return [None if math.isnan(mean) else mean for mean in mean_of_visible(errors, visible).tolist()]
