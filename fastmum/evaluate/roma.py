"""Matching by runs of RoMa: error of dense warps, and relative poses of the essential matrix of sampled matches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmum.errors import FastmumError
from fastmum.evaluate.pairs import Pair, PairSet
from fastmum.evaluate.records import Scored
from fastmum.geometry.metrics import direction_error, pose_auc, rotation_error
from fastmum.progress import progress_bar
from fastmum.tasks.pictures import colours, tiles
from fastmum.tasks.pose.scores import DEGREES
from fastmum.tasks.roma.infer import Trained, Warps, passes, pixels, sample
from fastmum.tasks.roma.losses import TrueWarp, true_warps
from fastmum.tasks.roma.pictures import moved
from fastmum.tasks.roma.scores import PCK, pixel_errors

BATCH = 8  # pairs whose pixels are averaged together, as in RoMa's dense benchmark
MATCHES, REPEATS = 5000, 5  # that are sampled, how often
THRESHOLD, CONFIDENCE = 0.5, 0.99999  # of the essential matrix: pixels at `SIDES`, probability
FAILED = 90.0  # degrees, if no pose is found
# Side of an image, and its pixels, in which the threshold is; what K's principal point lacks there, since ScanNet's
# counts the centres of pixels at integers (RoMa's benchmarks).
SIDES = {"scannet": (min, 480, 0.5)}
DEFAULT_SIDE = (max, 1200, 0.0)  # MegaDepth-1500's


def require_opencv() -> Any:
    """OpenCV; FastmumError if it is not installed."""
    try:
        import cv2
    except ImportError:
        raise FastmumError(
            "the essential matrix needs OpenCV: pip install 'fastmum[matching]', or pass --no-pose"
        ) from None
    return cv2


def evaluate_roma(
    trained: Trained, pairs: PairSet, size: int | None = None, pose: bool = True, pictures: Sequence[Pair] = (),
    seed: int = 0,
) -> Scored:  # fmt: skip
    """Score a run on pairs with depth and cameras.

    Dense: mean distance to the true warp in pixels of the first pass, from the first to the second image, and the
    shares below 1, 3 and 5 px, over the pixels with a true warp of `BATCH` pairs; means over batches. Pose: AUC@5/10/20
    of the larger of rotation and direction error (opposite directions count as equal) of five estimates a pair.

    Args:
        pose: also matches in two passes and estimates poses, which needs OpenCV.
        pictures: pairs that are drawn.
    """
    cv2, size = require_opencv() if pose else None, size or trained.image_size
    side = SIDES.get(pairs.name, DEFAULT_SIDE)
    generator = torch.Generator().manual_seed(seed)
    errors, batches, poses, drawn = list[Tensor](), list[Tensor](), list[float](), []
    per_pair_epe, per_pair_pose = dict[str, float | None](), dict[str, float]()
    for number, pair in enumerate(progress_bar(pairs.pairs, unit="pair", desc="evaluating"), 1):
        a, b = images = [np.array(frame.read_image()) for frame in (pair.a, pair.b)]
        both, truth = passes(trained, a, b, size), truth_of(pair, size)
        warps = next(both)
        found = pixel_errors(warps.points[:1].permute(0, 3, 1, 2), truth.points)[truth.visible]
        if not found.isfinite().all():
            raise FastmumError(f"the warp of '{pair.name}' is not finite: the weights of this run cannot be evaluated")
        errors.append(found)
        per_pair_epe[pair.name] = found.mean().item() if len(found) else None
        if pose:
            angles = pose_errors(cv2, next(both), pair, images, generator, side)
            poses += angles
            per_pair_pose[pair.name] = float(np.mean(angles))
        if pair in pictures:
            drawn.append(draw_pair(images, warps, truth))
        if (number % BATCH == 0 or number == len(pairs.pairs)) and any(len(each) for each in errors):
            whole = torch.cat(errors)
            batches.append(torch.stack([whole.mean(), *((whole < bound).float().mean() for bound in PCK)]))
            errors = []
    if not batches:
        raise FastmumError(f"no pixel of any pair of '{pairs.name}' has a true warp, so there is nothing to measure")
    epe, *shares = torch.stack(batches).double().mean(0).tolist()
    scores = {"epe": epe} | {f"pck{bound}": 100 * share for bound, share in zip(PCK, shares, strict=True)}
    if pose:
        areas = pose_auc(np.array(poses), DEGREES)
        scores |= {f"auc{t}": 100 * area for t, area in zip(DEGREES, areas, strict=True)}
    settings = {"size": size, "matches": MATCHES, "repeats": REPEATS, "seed": seed}
    numbers = {"scores": scores, "per_pair_epe": per_pair_epe, "per_pair_pose_error": per_pair_pose}
    return Scored(numbers | {"settings": settings}, drawn)


def truth_of(pair: Pair, size: int) -> TrueWarp:
    """The true warp of a pair on the pixels of a square of `size`; DataError if depth or cameras cannot be read."""
    maps, Ks = [], []
    for frame in (pair.a, pair.b):
        depth, camera = frame.read_depth(), frame.read_camera()
        assert depth is not None, frame
        assert camera is not None, frame
        resized = torch.nn.functional.interpolate(torch.from_numpy(depth)[None, None], (size, size), mode="bilinear")
        maps.append(resized[0])
        Ks.append(torch.from_numpy(camera.resized((size, size)).K)[None])
    T = torch.from_numpy(pair.T_b_a)[None]
    return true_warps(maps[0], maps[1], Ks[0], Ks[1], T, [(size, size)])[0]


def pose_errors(
    cv2: Any, warps: Warps, pair: Pair, images: Sequence[np.ndarray], generator: torch.Generator,
    side: tuple[Any, int, float] = DEFAULT_SIDE,
) -> list[float]:  # fmt: skip
    """The larger of rotation and direction error, degrees, of `REPEATS` estimates from reordered matches."""
    Ks, sizes = [], []
    for frame, image in zip((pair.a, pair.b), images, strict=True):
        camera = frame.read_camera()
        assert camera is not None, frame
        height, width = image.shape[:2]
        factor = side[1] / side[0](width, height)
        Ks.append(np.diag([factor, factor, 1.0]) @ camera.resized((width, height)).K)
        Ks[-1][:2, 2] += side[2]
        sizes += [factor * width, factor * height]
    true, found = pair.T_b_a, list[float]()
    matches, _ = sample(warps, MATCHES, generator)
    for _ in range(REPEATS):
        matches = matches[torch.randperm(len(matches), generator=generator)]
        try:
            pose = essential_pose(cv2, *np.split(pixels(matches, sizes), 2, axis=1), *Ks)
        except cv2.error:  # as in RoMa's benchmarks
            pose = None
        if pose is None:
            found.append(FAILED)
            continue
        R, t = pose
        angles = rotation_error(R, true[:3, :3]), direction_error(t, true[:3, 3], folded=True)
        found.append(float(np.nan_to_num(np.maximum(*angles), nan=FAILED)))
    return found


def essential_pose(
    cv2: Any, points_a: np.ndarray, points_b: np.ndarray, K_a: np.ndarray, K_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Rotation and direction of translation (3,) from points (n, 2) in pixels; None if no essential matrix is found."""
    if len(points_a) < 5:
        return None
    rays = [((p - K[:2, 2]) @ np.linalg.inv(K[:2, :2]).T) for p, K in ((points_a, K_a), (points_b, K_b))]
    focal = np.mean([K_a[0, 0], K_a[1, 1], K_b[0, 0], K_b[1, 1]])
    E, mask = cv2.findEssentialMat(*rays, np.eye(3), threshold=THRESHOLD / focal, prob=CONFIDENCE)
    best, pose = 0, None
    for each in () if E is None else np.split(E, len(E) // 3):
        inliers, R, t, _ = cv2.recoverPose(each, *rays, np.eye(3), 1e9, mask=mask)
        if inliers > best:
            best, pose = inliers, (R, t[:, 0])
    return pose


def draw_pair(images: Sequence[np.ndarray], warps: Warps, truth: TrueWarp) -> Image.Image:
    """Both images, each seen from the other one where the warp is certain, and the true warp."""
    a, b = (torch.from_numpy(image) for image in images)
    named: list[tuple[str, Any]] = [("first image", a), ("second image", b)]
    for name, image, points, certainty in zip(
        ("second, warped", "first, warped"), (b, a), warps.points, warps.certainty, strict=True
    ):
        named.append((name, faded(moved(image, points), certainty)))
    named.append(("certainty", colours(warps.certainty[0].numpy(), 0, 1)))
    named.append(("second, true warp", faded(moved(b, truth.points[0].permute(1, 2, 0)), truth.visible[0].float())))
    return tiles(named, len(named))


def faded(image: Tensor, certainty: Tensor) -> Tensor:
    """An image (h, w, 3) uint8, white where the certainty (h, w) is 0."""
    share = certainty[..., None].clamp(0, 1)
    return (share * image + (1 - share) * 255).round().to(torch.uint8)
