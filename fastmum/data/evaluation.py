"""Frames of an evaluation: which of a sequence, and at which size."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion

from fastmum.data.manifest import Manifests
from fastmum.data.samples import manifest_frame
from fastmum.data.scene_loader import SceneBatch, sequence_label, stack
from fastmum.errors import FastmumError
from fastmum.geometry import View, crop_resize

FRAMES, SEED = 10, 0  # of VGGT's pose evaluation
WHITE = 255  # what VGGT pads smaller images with


class EvaluationSequence(NamedTuple):
    """Frames of a sequence that are evaluated together."""

    name: str
    group: str  # category or scene: the name up to the first "/"; scores of a group are pooled
    rows: np.ndarray  # (n,) int64, in the order that they were drawn


def evaluation_sequences(
    manifests: Manifests, frames: int = FRAMES, seed: int = SEED, most: int | None = None,
    columns: Iterable[str] = ("pose", "intrinsics"), only: Iterable[int] | None = None,
) -> list[EvaluationSequence]:  # fmt: skip
    """Random frames without replacement, of sequences that have as many with `columns` of the manifest.

    One generator serves the whole list, so it must be drawn as a whole. It is NumPy's older `RandomState`, as in the
    public evaluation, whose frames it repeats for the same sequences in the same order.

    Args:
        most: sequences of each group, the first ones; None: all.
        only: sequences to draw from (held-out ones); None: all.
    """
    usable = np.ones(manifests.num_frames, bool)
    for column in columns:
        usable &= manifests.present(column)
    random, found, counts = np.random.RandomState(seed), list[EvaluationSequence](), Counter[str]()
    for sequence in range(manifests.num_sequences) if only is None else sorted(only):
        first, end = manifests.starts[sequence : sequence + 2]
        rows = first + np.flatnonzero(usable[first:end])
        name = manifests.sequence_name(sequence)
        group = name.partition("/")[0]
        if len(rows) >= frames and (most is None or counts[group] < most):
            counts[group] += 1
            chosen = rows[random.choice(len(rows), frames, replace=False)]
            found.append(EvaluationSequence(name, group, chosen))
    return found


def evaluation_size(
    size: tuple[int, int], longest: int = 512, patch_size: int = 16, keep_aspect: bool = True
) -> tuple[int, int]:
    """Width and height at which an image of `size` (width, height) is evaluated, multiples of `patch_size`.

    The longer side becomes `longest`, the other keeps the aspect ratio to within half a patch, or becomes `longest`,
    too. FastmumError: `longest` is no multiple of the patch size.
    """
    if longest % patch_size or longest < patch_size:
        raise FastmumError(f"the image size is {longest}, but must be a multiple of the patch size {patch_size}")
    if not keep_aspect:
        return longest, longest
    width, height = (max(1, round(side * longest / max(size) / patch_size)) * patch_size for side in size)
    return width, height


def evaluation_batch(
    manifests: Manifests, rows: Sequence[int] | np.ndarray, longest: int = 512, patch_size: int = 16,
    keep_aspect: bool = True, erode: int = 0,
) -> SceneBatch:  # fmt: skip
    """Read the frames of a sequence, resized (bicubic), without augmentation or cleaning of depth.

    Images that are smaller than others of the sequence are padded with white on all sides, which moves their
    intrinsics, too. DataError: a file that cannot be read; FastmumError: a frame without intrinsics.

    Args:
        erode: if above 0, depth counts only inside of the mask, which a square of so many pixels erodes first.
    """
    views = []
    for row in np.asarray(rows).tolist():
        view = manifest_frame(manifests, row).view()
        if view.camera is None:
            raise FastmumError(f"'{manifests.file(row)}' has no intrinsics")
        if erode and view.depth is not None and view.mask is not None:
            inside = binary_erosion(view.mask, np.ones((erode, erode)), border_value=1)
            view = replace(view, depth=np.where(inside, view.depth, np.float32(0)))
        size = evaluation_size(view.size, longest, patch_size, keep_aspect)
        views.append(crop_resize(view, None, size, resample=Image.Resampling.BICUBIC))
    width, height = (max(view.size[axis] for view in views) for axis in range(2))
    name = sequence_label(manifests, int(manifests.sequence_of(int(rows[0]))))
    return stack([pad(view, (width, height)) for view in views], [len(views)], [name])


def pad(view: View, size: tuple[int, int], colour: int | Sequence[int] = WHITE) -> View:
    """The view in the middle of an image of `size` (width, height) and a colour, without depth outside of the view."""
    if view.size == size:
        return view
    left, top = ((new - old) // 2 for new, old in zip(size, view.size, strict=True))
    padded = crop_resize(view, (-left, -top, size[0] - left, size[1] - top))
    image = np.empty_like(padded.image)
    image[:] = colour
    inside = slice(top, top + view.size[1]), slice(left, left + view.size[0])
    image[inside] = padded.image[inside]
    return View(image, padded.camera, padded.depth, padded.mask)
