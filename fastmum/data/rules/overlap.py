"""Overlap of the images of a scene: 3-D points that two images share, counted for all pairs at once.

The counts are the product of the sparse image x point incidence matrix with its transpose: the work grows with the sum
of squared track lengths, not with the number of pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Overlap(NamedTuple):
    """Shared points of all pairs of images that share any (compressed sparse rows, no diagonal).

    Args:
        points: (n,) int64, 3-D points that each image sees.
        starts: (n + 1,) int64, entries of image i are starts[i]:starts[i + 1].
        neighbours: (e,) int32, images that share points with the row's image, ascending in each row.
        shared: (e,) int32, number of shared points.
    """

    points: np.ndarray
    starts: np.ndarray
    neighbours: np.ndarray
    shared: np.ndarray

    @property
    def num_images(self) -> int:
        """Images of the scene, including those without points."""
        return len(self.points)

    def row(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours of an image (k,) and overlap_ij = shared points / points of i (k,) float64: not symmetric."""
        entries = slice(self.starts[image], self.starts[image + 1])
        return self.neighbours[entries], self.shared[entries] / self.points[image]

    def ranked(self, image: int) -> np.ndarray:
        """Neighbours of an image (k,), most overlap first; ties go to the lower number."""
        entries = slice(self.starts[image], self.starts[image + 1])
        return self.neighbours[entries][np.argsort(-self.shared[entries], kind="stable")]


def count_shared(images: np.ndarray, points: np.ndarray, num_images: int) -> Overlap:
    """Overlap of all pairs.

    Args:
        images, points: (m,) integers, image and point of each observation. Repeated observations count once.
        num_images: of the scene.
    """
    from scipy import sparse  # slow to import, and only needed here

    num_points = int(points.max(initial=-1)) + 1
    ones = np.ones(len(images), np.int32)
    seen = sparse.coo_array((ones, (images, points)), shape=(num_images, num_points)).tocsr()
    seen.data.fill(1)
    shared = seen @ seen.T.tocsr()
    count = shared.diagonal().astype(np.int64)
    shared.setdiag(0)
    shared.eliminate_zeros()
    shared.sort_indices()
    return Overlap(count, shared.indptr.astype(np.int64), shared.indices.astype(np.int32), shared.data)
