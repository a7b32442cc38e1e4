"""Alignment of point clouds: Umeyama's similarity and point-to-point ICP."""

from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree


class Similarity(NamedTuple):
    """x -> scale * R @ x + t, with a scalar, (3, 3) and (3,) float64."""

    scale: float
    R: np.ndarray
    t: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 3)."""
        return self.scale * points @ self.R.T + self.t


class Registration(NamedTuple):
    """Result of `icp`."""

    transformation: np.ndarray  # (4, 4) float64, source to target
    fitness: float  # share of the source points with a target point within the threshold
    rmse: float  # root mean square distance of those


def umeyama(source: np.ndarray, target: np.ndarray, with_scale: bool = True) -> Similarity:
    """The least-squares similarity between corresponding points (N, 3); a reflection is never returned.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991.
    """
    source, target = source.astype(np.float64), target.astype(np.float64)
    centre_s, centre_t = source.mean(0), target.mean(0)
    centred = source - centre_s
    U, S, Vt = np.linalg.svd((target - centre_t).T @ centred / len(source))
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(U) * np.linalg.det(Vt))])
    R = U * sign @ Vt
    scale = float((S * sign).sum() / centred.var(0).sum()) if with_scale else 1.0
    return Similarity(scale, R, centre_t - scale * R @ centre_s)


def icp(
    source: np.ndarray, target: np.ndarray, threshold: float, max_iterations: int = 30, tolerance: float = 1e-6
) -> Registration:
    """Rigid point-to-point ICP from the identity, with open3d's rules.

    Source (N, 3), target (M, 3); `threshold` is the largest distance of corresponding points. Stops when fitness and
    rmse both change by less than `tolerance`, or no source point has a target point within the threshold.
    """
    tree, moved, T = cKDTree(target), source.astype(np.float64), np.eye(4)
    pairs, fitness, rmse = _correspondences(tree, moved, threshold)
    for _ in range(max_iterations):
        if not fitness:
            break
        _, R, t = umeyama(moved[pairs[0]], target[pairs[1]], with_scale=False)
        step = np.vstack([np.c_[R, t], [0, 0, 0, 1]])
        T, moved = step @ T, moved @ R.T + t
        before = fitness, rmse
        pairs, fitness, rmse = _correspondences(tree, moved, threshold)
        if abs(before[0] - fitness) < tolerance and abs(before[1] - rmse) < tolerance:
            break
    return Registration(T, fitness, rmse)


def _correspondences(tree: cKDTree, points: np.ndarray, threshold: float) -> tuple[np.ndarray, float, float]:
    """Indices (2, K) of points and of their nearest target points within the threshold, fitness and rmse."""
    distance, nearest = tree.query(points, distance_upper_bound=threshold)
    found = np.flatnonzero(np.isfinite(distance))
    rmse = float(np.sqrt(np.square(distance[found]).mean())) if len(found) else 0.0
    return np.stack([found, nearest[found]]), len(found) / len(points), rmse
