"""Reconstruction: accuracy of relative poses (AUC), and of points after alignment, on frames with known cameras."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmum.data.build import build
from fastmum.data.builders import BUILDERS
from fastmum.data.errors import DataError
from fastmum.data.evaluation import FRAMES, EvaluationSequence, evaluation_batch, evaluation_sequences
from fastmum.data.manifest import Manifests, write_manifest
from fastmum.data.scene_loader import SceneBatch
from fastmum.data.splits import rendered_scene
from fastmum.evaluate.pairs import scenes
from fastmum.evaluate.pairs.pair import evenly
from fastmum.evaluate.records import Scored
from fastmum.files import expand_user
from fastmum.geometry.align import icp, umeyama
from fastmum.geometry.camera import rigid_inverse, transform, unproject
from fastmum.geometry.metrics import (
    direction_error,
    estimate_normals,
    pair_poses,
    point_metrics,
    pose_auc_histogram,
    rotation_error_quaternion,
)
from fastmum.progress import progress_bar
from fastmum.tasks.reconstruction.infer import Estimate
from fastmum.tasks.reconstruction.pictures import SceneViews, draw_scenes

DEGREES = (30, 15, 5, 3)  # of the AUC
LEAST_DEPTH = 1e-4  # Pi3: smaller ones are unknown
LEAST_POINTS = 100  # that are aligned

Predict = Callable[[SceneBatch], Estimate]


class Protocol(NamedTuple):
    """How a set is evaluated; distances are in its unit."""

    frames: int | None = FRAMES  # random ones of a sequence, without replacement; None: all, in order
    most: int | None = None  # sequences of a group, the first ones; None: all
    threshold: float | None = None  # of the ICP; None: points are not measured
    erode: int = 0  # pixels that masks are eroded by
    size: int | None = 512  # of the paper's training (VGGT's evaluation: 518, of patches of 14); None: the run's


# VGGT's evaluation as davnords/vggt has it; its points are Pi3's.
PROTOCOLS = {
    "scenes": Protocol(threshold=0.1, size=None),  # metres
    "megadepth": Protocol(most=10),
    "dtu": Protocol(frames=None, threshold=100.0, erode=10),  # millimetres
    "eth3d": Protocol(frames=None, threshold=0.1),  # metres
}


class OpenSet(NamedTuple):
    """A set of sequences."""

    name: str
    protocol: Protocol
    manifests: Manifests


def open_set(data: str, folder: Path) -> OpenSet:
    """A set by its name: "scenes", a manifest, or KIND:PATH, whose manifest is built in `folder`.

    DataError: there is no such kind, or it cannot be read.
    """
    kind, colon, path = data.partition(":")
    file = folder / f"{kind}.arrow"
    if not colon and Path(data).suffix == ".arrow":
        file = expand_user(data)
    elif data == "scenes":
        folders = scenes.embedded_folders("test")
        records = (rendered_scene(each.parent, each.name) for each in folders)
        write_manifest(file, records, dataset=kind, root=folders[0].parent, metadata={})
    elif colon and kind in BUILDERS:
        build(kind, path, file, progress=True)
    else:
        known = ", ".join(BUILDERS)
        raise DataError(
            f"--data is '{data}', but must be scenes, a manifest (.arrow), or KIND:PATH with one of {known}"
        )
    manifests = Manifests([file])
    name = kind = " and ".join(manifests.datasets)
    if colon and kind == "scenes":
        name = f"{Path(path).resolve().name} (folder)"  # not the name of the embedded ones
    return OpenSet(name, PROTOCOLS.get(kind, Protocol()), manifests)


def list_sequences(manifests: Manifests, protocol: Protocol) -> list[EvaluationSequence]:
    """Sequences and their frames; DataError if none has enough with cameras, and depth if points are measured."""
    columns = ["pose", "intrinsics"] + (["depth"] if protocol.threshold is not None else [])
    if protocol.frames is not None:
        found = evaluation_sequences(manifests, protocol.frames, most=protocol.most, columns=columns)
    else:
        usable, found = np.logical_and.reduce([manifests.present(name) for name in columns]), []
        for i, (first, end) in enumerate(zip(manifests.starts[:-1], manifests.starts[1:], strict=True)):
            name, rows = manifests.sequence_name(i), first + np.flatnonzero(usable[first:end])
            if len(rows) >= 2:
                found.append(EvaluationSequence(name, name.partition("/")[0], rows))
    if not found:
        what = f"no sequence of '{' and '.join(manifests.datasets)}' has {protocol.frames or 2} frames"
        raise DataError(f"{what} with {', '.join(columns)}")
    return found


def evaluate_reconstruction(
    predict: Predict, manifests: Manifests, protocol: Protocol, size: int, patch_size: int = 16,
    keep_aspect: bool = True, most: int | None = None, pictures: int = 0,
) -> Scored:  # fmt: skip
    """Score predictions of the sequences of a set.

    Poses: AUC of the larger of rotation and direction error over all pairs of frames of a group, averaged over groups.
    Points: `point_scores`, averaged over sequences. All in float64.

    Args:
        predict: cameras and points of a batch of one sequence.
        size: longer side of the images, see `evaluation_size`.
        most: sequences that are evaluated, evenly spread.
        pictures: sequences that are drawn.
    """
    every = list_sequences(manifests, protocol)
    chosen = evenly(every, most)
    shown = {sequence.name for sequence in evenly(chosen, pictures)} if pictures else set()
    groups, per_sequence, drawn = defaultdict(list), dict[str, dict[str, float]](), []
    for sequence in progress_bar(chosen, unit="sequence", desc="evaluating"):
        batch = evaluation_batch(manifests, sequence.rows, size, patch_size, keep_aspect, protocol.erode)
        found = predict(batch)
        errors = pose_errors(found.camera_from_world, batch.camera_from_world.double().numpy())
        groups[sequence.group].append(errors)
        scores = dict(zip((f"auc{t}" for t in DEGREES), percent(errors), strict=True))
        truth = world_points(batch) if batch.valid.any() else None
        if truth is not None and protocol.threshold is not None:
            scores |= point_scores(found, truth, batch, protocol.threshold)
        per_sequence[sequence.name] = scores
        if sequence.name in shown and truth is not None:
            drawn.append(draw_scenes([aligned(sequence.name, batch, found, truth)]))
    means = np.mean([percent(np.concatenate(errors)) for errors in groups.values()], axis=0)
    scores = dict(zip((f"auc{t}" for t in DEGREES), means.tolist(), strict=True))
    for name in dict.fromkeys(name for each in per_sequence.values() for name in each if name not in scores):
        scores[name] = float(np.mean([each[name] for each in per_sequence.values() if name in each]))
    settings: dict[str, Any] = {"size": size, "keep_aspect": keep_aspect, "frames": protocol.frames or "all"}
    settings |= {"icp_threshold": protocol.threshold} if protocol.threshold is not None else {}
    about = {"pairs": len(chosen), "set_pairs": len(every), "scores": scores, "settings": settings}
    return Scored(about | {"groups": len(groups), "per_sequence": per_sequence}, drawn)


def pose_errors(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The larger of rotation and direction error of all pairs, degrees, from camera_from_world (F, 4, 4) each."""
    a, b = (pair_poses(poses.astype(np.float64)) for poses in (found, true))
    rotation = rotation_error_quaternion(a[:, :3, :3], b[:, :3, :3])
    return np.maximum(rotation, direction_error(a[:, :3, 3], b[:, :3, 3], folded=True))


def percent(errors: np.ndarray) -> np.ndarray:
    """The AUC up to each of `DEGREES`."""
    return 100 * np.array(pose_auc_histogram(errors, DEGREES))


def world_points(batch: SceneBatch) -> np.ndarray:
    """True points of a batch, (F, H, W, 3) float64."""
    frames = zip(
        batch.depth.numpy(), batch.intrinsics.double().numpy(), batch.camera_from_world.double().numpy(), strict=True
    )
    return np.stack([transform(rigid_inverse(T), unproject(depth, K)) for depth, K, T in frames])


def point_scores(found: Estimate, truth: np.ndarray, batch: SceneBatch, threshold: float) -> dict[str, float]:
    """Accuracy, completeness and consistency of normals after Umeyama's similarity on all valid pixels and ICP.

    "nc_*" are the means of both directions; "abs_rel" is the relative error of depth after scaling by the ratio of
    medians. Nothing, if there are fewer than `LEAST_POINTS` points.
    """
    depth, points = batch.depth.numpy(), found.world_points()
    valid = batch.valid.numpy() & (depth > LEAST_DEPTH) & np.isfinite(points).all(-1)
    if valid.sum() < LEAST_POINTS:
        return {}
    target, source = truth[valid], points[valid].astype(np.float64)
    source = umeyama(source, target)(source)
    source = transform(icp(source, target, threshold).transformation, source)
    scores = point_metrics(source, target, estimate_normals(source), estimate_normals(target))
    for kind in ("mean", "median"):
        scores[f"nc_{kind}"] = (scores.pop(f"nc1_{kind}") + scores.pop(f"nc2_{kind}")) / 2
    predicted, true = found.depth[valid].astype(np.float64), depth[valid].astype(np.float64)
    predicted = predicted * np.median(true) / np.median(predicted)
    return scores | {"abs_rel": float((np.abs(predicted - true) / true).mean())}


def aligned(name: str, batch: SceneBatch, found: Estimate, truth: np.ndarray) -> SceneViews:
    """For a picture: a similarity on the valid pixels moves the prediction to the true points `truth`."""
    points = found.world_points()
    valid = batch.valid.numpy() & np.isfinite(points).all(-1)
    scale, R, t = similarity = umeyama(points[valid], truth[valid])
    poses = found.camera_from_world.copy()
    poses[:, :3, :3] = poses[:, :3, :3] @ R.T
    poses[:, :3, 3] = scale * poses[:, :3, 3] - poses[:, :3, :3] @ t
    true = batch.camera_from_world.double().numpy()
    depths = batch.depth.numpy(), scale * found.depth
    with np.errstate(invalid="ignore"):  # points that are not finite
        return SceneViews(name, batch.images.numpy(), valid, depths, (true, poses), (truth, similarity(points)))
