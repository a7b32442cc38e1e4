"""Relative pose by runs of that task: AUC of pairs with known cameras (Reloc3r's evaluation)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastmum.data.errors import DataError
from fastmum.data.samples import Frame
from fastmum.evaluate.pairs import Pair, PairSet
from fastmum.evaluate.records import Scored
from fastmum.geometry import View
from fastmum.geometry.camera import rigid_inverse
from fastmum.progress import progress_bar
from fastmum.tasks.pose.infer import prepare
from fastmum.tasks.pose.pictures import PairView, draw_pairs, pose_matrix
from fastmum.tasks.pose.scores import DEGREES, Errors, errors_of, scores_of

BATCH = 16  # pairs that are predicted at once

Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def evaluate_pose(predict: Predict, pairs: PairSet, size: int, most: int | None = None, pictures: int = 0) -> Scored:
    """AUC@5/10/20 in percent of the larger of rotation and direction error, and medians of both in degrees.

    Directions are not folded; a prediction that is not finite, or a translation of 0, is 180 degrees off. In float64.

    Args:
        predict: `estimate` of a run: images (B, 2, size, size, 3) uint8 -> poses of view b in view a.
        size: side of the images, cropped as in training (`prepare`).
        most: pairs that are evaluated, evenly spread.
        pictures: pairs that are drawn.
    """
    chosen = pairs.first(most)
    shown = {id(pair) for pair in chosen.first(pictures).pairs} if pictures else set()
    errors, drawn = list[Errors](), []
    every = chosen.pairs
    with progress_bar(total=len(every), unit="pair", desc="evaluating") as bar:
        for start in range(0, len(every), BATCH):
            batch = every[start : start + BATCH]
            views = [[read(frame, size) for frame in (pair.a, pair.b)] for pair in batch]
            R, t = predict(np.stack([[view.image for view in both] for both in views]))
            true = np.stack([rigid_inverse(pair.T_b_a) for pair in batch])
            errors.append(errors_of(R, t, true[:, :3, :3], true[:, :3, 3]))
            for i, (pair, both) in enumerate(zip(batch, views, strict=True)):
                if id(pair) in shown:
                    drawn.append(draw_pairs([draw_of(pair, both, R[i], t[i])]))
            bar.update(len(batch))
    joined = Errors(*map(np.concatenate, zip(*errors, strict=True)))
    scores = scores_of(joined)
    scores |= {name: 100 * scores[name] for name in (f"auc{degrees}" for degrees in DEGREES)}
    each = {
        pair.name: {"rotation": rotation, "direction": direction}
        for pair, rotation, direction in zip(every, *(e.tolist() for e in joined), strict=True)
    }
    about = {"pairs": len(every), "set_pairs": chosen.of or len(every), "scores": scores, "settings": {"size": size}}
    return Scored(about | {"per_sequence": each}, drawn)


def read(frame: Frame, size: int) -> View:
    """An image as the model reads it, with its camera; FastmumError names a file that cannot be used."""
    if frame.camera_from_world is None:
        raise DataError(f"'{frame.key}' has no pose, which the evaluation of poses needs")
    return prepare(replace(frame, depth=None, mask=None).view(), size, frame.file or Path(frame.key))


def draw_of(pair: Pair, views: list[View], R: np.ndarray, t: np.ndarray) -> PairView:
    """A pair for a picture."""
    a, b = (view.camera for view in views)
    assert a is not None
    assert b is not None
    images = views[0].image, views[1].image
    return PairView(pair.name, images, (a.K, b.K), rigid_inverse(pose_matrix(R, t)), pair.T_b_a)
