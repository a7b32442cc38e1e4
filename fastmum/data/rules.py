"""Rules that form sequences: pure functions of what a data set says about its frames.

Numbered frames are cut into chunks. Unordered collections are chained by overlap, the 3-D points that two images share:
two rules of the paper, and what the authors' released script does instead of the first. Chains are arrays of image
numbers; ties go to the lower number, so results depend on the scene and the seed only.
"""

from typing import NamedTuple

import numpy as np

# "We find that a chunk size of 100 frames usually works fine" (supplement, "Data sequences").
CHUNK = 100
# Released MegaDepth script: an anchor and its 255 nearest. The paper states no bound, so its rule uses this one too.
CHAIN_LENGTH = 256
# Supplement A, "Data sequences".
CHAINS_PER_SCENE = 1000
MIN_VIEWS = 24
# Rule of MegaScenes, after CroCo v2: least share of the current image's points, least rotation of the camera, degrees.
MIN_OVERLAP = 0.10
MIN_ANGLE = 10.0


def cut_into_chunks(num_frames: int, size: int = CHUNK, last_takes_rest: bool = False) -> list[range]:
    """Consecutive ranges that cover 0 .. num_frames - 1; none for 0 frames.

    The frames that do not fill a chunk are a shorter one. With `last_takes_rest` (the released scripts) the last one
    takes the rest, of 1 to `size` frames, so that it has up to 2 size frames.
    """
    count = max(1, (num_frames - 1) // size) if last_takes_rest else -(-num_frames // size)
    ends = [i * size for i in range(1, count)] + [num_frames]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False) if start < end]


class Overlap(NamedTuple):
    """Shared points of all pairs of images that share any (compressed sparse rows, no diagonal)."""

    points: np.ndarray  # (n,) int64, 3-D points that each image of the scene sees
    starts: np.ndarray  # (n + 1,) int64, entries of image i are starts[i]:starts[i + 1]
    neighbours: np.ndarray  # (e,) int32, images that share points with the row's image, ascending in each row
    shared: np.ndarray  # (e,) int32, number of shared points

    def row(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours of an image (k,) and overlap_ij = shared points / points of i (k,) float64: not symmetric."""
        entries = slice(self.starts[image], self.starts[image + 1])
        return self.neighbours[entries], self.shared[entries] / self.points[image]

    def ranked(self, image: int) -> np.ndarray:
        """Neighbours of an image (k,), most overlap first; ties go to the lower number."""
        entries = slice(self.starts[image], self.starts[image + 1])
        return self.neighbours[entries][np.argsort(-self.shared[entries], kind="stable")]


def count_shared(images: np.ndarray, points: np.ndarray, num_images: int) -> Overlap:
    """Overlap of all pairs, from the product of the sparse image x point incidence matrix with its transpose.

    The work grows with the sum of squared track lengths, not with the number of pairs. `images`, `points` (m,) are the
    image and point of each observation; repeated observations count once.
    """
    from scipy import sparse  # slow to import

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


def overlap_chains(
    overlap: Overlap, rng: np.random.Generator, sequences: int = CHAINS_PER_SCENE, length: int = CHAIN_LENGTH
) -> list[np.ndarray]:
    """MegaDepth's rule: from a random anchor, always on to the unused image of most overlap, while there is any.

    Anchors are drawn with replacement from the images that share points with another one; equal anchors give equal
    chains. Without shared points there are no chains. Returns image numbers (2..length,) int32 of each chain.
    """
    linked = np.flatnonzero(np.diff(overlap.starts))
    if not len(linked):
        return []
    anchors = rng.choice(linked, size=sequences)
    ranked = [overlap.ranked(i) for i in range(len(overlap.points))]
    chains = {}
    for anchor in np.unique(anchors):
        chain, best, unused = list[int](), anchor, np.ones(len(ranked), bool)
        while unused[best] and len(chain) < length:
            chain.append(best)
            unused[best] = False
            neighbours = ranked[best]  # not empty: every image of a chain shares points with another one
            best = neighbours[unused[neighbours].argmax()]  # a used one if there is no other
        chains[anchor] = np.array(chain, np.int32)
    return [chains[anchor] for anchor in anchors]


def nearest_of_anchor(
    overlap: Overlap, rng: np.random.Generator, sequences: int = CHAINS_PER_SCENE, length: int = CHAIN_LENGTH,
    present: np.ndarray | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """The released script instead of MegaDepth's rule: a random anchor and the images of most overlap with it.

    Images without overlap fill up to the exact length, in the order of their numbers. A scene with fewer images gives
    nothing. Anchors are drawn from all images; one whose file is missing (`present`, (n,) bool) costs a sequence.
    Returns image numbers (length,) int32 of each sequence, the anchor first.
    """
    present = np.ones(len(overlap.points), bool) if present is None else present
    if present.sum() < length:
        return []
    anchors, found = rng.integers(len(overlap.points), size=sequences), {}
    for anchor in np.unique(anchors[present[anchors]]):
        neighbours = overlap.ranked(anchor)
        first = [anchor, *neighbours[present[neighbours]]]
        others = np.setdiff1d(np.flatnonzero(present), first)
        found[anchor] = np.concatenate([first, others])[:length].astype(np.int32)
    return [found[anchor] for anchor in anchors if present[anchor]]


def angle_chains(
    overlap: Overlap, rotations: np.ndarray, min_views: int = MIN_VIEWS,
    min_overlap: float = MIN_OVERLAP, min_angle: float = MIN_ANGLE,
) -> list[np.ndarray]:  # fmt: skip
    """MegaScenes' rule: chains of overlapping images whose cameras rotate.

    A chain starts at the unused image that sees most points. The next image is the unused one of the largest
    overlap x 4 cos(t) (1 - cos(t)), where t is the angle between the rotations of the two cameras, among those with
    overlap >= `min_overlap` and t >= `min_angle`. Images of a chain that is too short become free for later chains, as
    in the released code, but do not start another one.

    `rotations` (n, 3, 3) are camera_from_world, `min_angle` is in degrees. Returns image numbers (>= min_views,) int32
    of each chain, in the order they are found.
    """
    flat = np.ascontiguousarray(rotations, np.float64).reshape(-1, 9)
    unused, chains = np.ones(len(overlap.points), bool), []
    for seed in np.argsort(-overlap.points, kind="stable"):
        if not unused[seed]:
            continue
        chain, best = list[int](), int(seed)
        while best >= 0:
            chain.append(best)
            unused[best] = False
            neighbours, share = overlap.row(best)
            keep = unused[neighbours] & (share >= min_overlap)
            neighbours, share = neighbours[keep], share[keep]
            # trace(R_j R_i^T) is the sum of products of the entries, and 1 + 2 cos(t).
            cosine = np.clip((flat[neighbours] @ flat[best] - 1) / 2, -1, 1)
            turned = np.degrees(np.arccos(cosine)) >= min_angle
            score = np.where(turned, share * 4 * cosine * (1 - cosine), -np.inf)
            best = int(neighbours[score.argmax()]) if turned.any() else -1
        if len(chain) >= min_views:
            chains.append(np.array(chain, np.int32))
        else:
            unused[chain] = True
    return chains
