"""Segmentation with frozen features as CAPI evaluates it (facebookresearch/capi, eval_segmentation.py).

Each patch of an image is a sample: its token, and the block of p x p labels below it. k nearest neighbours copy blocks,
logistic regression predicts one label for a whole block.

Legend: N samples, D width, L = p * p labels of a block.
"""

import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmum.errors import FastmumError
from fastmum.progress import progress_bar

log = logging.getLogger(__name__)

LABELS = 256  # values of uint8
NEIGHBOURS = (1, 3, 10, 30)
DISTANCES: tuple["Distance", ...] = ("cosine", "L2")
INVERSE_PENALTIES = tuple((10 ** np.linspace(-6, 5, 8)).tolist())  # C of the logistic regression
MAX_ITERATIONS, TOLERANCE, LINE_SEARCH = 1000, 1e-12, 50  # of L-BFGS; its memory is 5 in cuML
QUERIES, KEYS = 1024, 16_384  # compared at once: 67 MB of float32 distances
ROWS = 65_536  # standardised, or compared with the truth, at once

Distance = Literal["cosine", "L2"]
Setting = tuple[Any, ...]  # (neighbours, distance), or (C,)


class Samples(NamedTuple):
    """Patches of images."""

    features: Tensor  # (N, D) float32
    labels: Tensor  # (N, L) uint8

    def fitted(self, ignore: Sequence[int]) -> "Samples":
        """Without patches whose most frequent label (of several: the smallest) is ignored; FastmumError if all are."""
        kept = ~torch.isin(block_modes(self.labels), torch.tensor(ignore, dtype=torch.uint8))
        if not kept.any():
            raise FastmumError(f"every patch to train on has an ignored label ({', '.join(map(str, ignore))})")
        return Samples(self.features[kept], self.labels[kept])

    def joined(self, other: "Samples") -> "Samples":
        """These and the other samples."""
        return Samples(*map(torch.cat, zip(self, other, strict=True)))


class Scores(NamedTuple):
    """Scores of predicted labels; pixels whose true label is ignored are left out."""

    miou: float  # mean over the labels that occur in truth or prediction, so over predicted ignored labels, too
    accuracy: float
    classes: int  # labels that the mean is over
    ignored: int  # ignored ones among them; each lowers the mean, since its IoU is 0


def confusion(truth: Tensor, predicted: Tensor) -> Tensor:
    """Pixels by true and predicted label, (256, 256) int64, of uint8 labels of one shape."""
    counts = torch.zeros(LABELS**2, dtype=torch.int64)
    for true, found in zip(truth.split(ROWS), predicted.split(ROWS), strict=True):  # int64 is large
        counts += torch.bincount(true.flatten().long() * LABELS + found.flatten(), minlength=LABELS**2)
    return counts.view(LABELS, LABELS)


def scores_of(confused: Tensor, ignore: Sequence[int]) -> Scores:
    """Scores in 0..1 of a confusion matrix; FastmumError if every pixel is ignored."""
    counts = confused.double()
    counts[list(ignore)] = 0
    if not counts.any():
        raise FastmumError(f"every pixel has an ignored label ({', '.join(map(str, ignore))})")
    right, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    there = union > 0
    iou = right[there] / union[there]
    ignored = int(there[list(ignore)].sum())
    return Scores(iou.mean().item(), (right.sum() / counts.sum()).item(), int(there.sum()), ignored)


def block_modes(labels: Tensor) -> Tensor:
    """The most frequent label of each block, of several the smallest: (N, L) -> (N,)."""
    return labels.mode(dim=-1).values


def label_blocks(label: np.ndarray, patch: int) -> np.ndarray:
    """Labels (H, W) of an image by patch, row by row: (H / p * W / p, p * p)."""
    rows, columns = label.shape[0] // patch, label.shape[1] // patch
    return label.reshape(rows, patch, columns, patch).swapaxes(1, 2).reshape(rows * columns, patch**2)


def standardiser(features: Tensor) -> Callable[[Tensor], Tensor]:
    """In-place standardisation of (N, D) by mean and population standard deviation of `features`, in float64."""
    mean = sum(rows.double().sum(0) for rows in features.split(ROWS)) / len(features)
    variance = sum((rows.double() - mean).square().sum(0) for rows in features.split(ROWS)) / len(features)
    std = torch.where(variance > 0, variance, 1.0).sqrt()

    def standardise(x: Tensor) -> Tensor:
        for rows in x.split(ROWS):
            rows.copy_((rows.double() - mean) / std)
        return x

    return standardise


@torch.no_grad()
def nearest(
    queries: Tensor, keys: Tensor, most: int, distance: Distance, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Indices (n, k) of the k = `most` nearest keys (N, D), nearest first, for queries (., D), some rows at a time.

    Keys are converted and copied to the device once, if they take at most half of its free memory.
    """
    chunks: Sequence[Tensor] = keys.split(KEYS)
    size, on_gpu = keys.numel() * dtype.itemsize, torch.device(device).type == "cuda"
    if not on_gpu or size < torch.cuda.mem_get_info(device)[0] / 2:
        chunks = [chunk.to(device, dtype) for chunk in chunks]  # views of float32 on the CPU
    norms = [chunk.to(device, dtype).norm(dim=1) for chunk in chunks]
    for first in range(0, len(queries), QUERIES):
        rows = slice(first, min(first + QUERIES, len(queries)))
        query = queries[rows].to(device, dtype)
        found, where = [], []
        for i, chunk in enumerate(chunks):
            near = query @ chunk.to(device, dtype).T
            near = near / norms[i].clamp(min=1e-30) if distance == "cosine" else near - norms[i].square() / 2
            values, index = near.topk(min(most, len(chunk)), dim=1)
            found.append(values)
            where.append(index + i * KEYS)
        order = torch.cat(found, dim=1).topk(min(most, len(keys)), dim=1).indices
        yield rows, torch.cat(where, dim=1).gather(1, order).cpu()


def knn(
    train: Samples, queries: Tensor, settings: Iterable[Setting], dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[slice, dict[Setting, Tensor]]]:  # fmt: skip
    """Predicted blocks (n, L) of some rows of the queries at a time, by (number of neighbours, distance).

    A pixel gets the most frequent label (of several: the smallest) of the neighbours' blocks at that place. The search
    is common to all numbers of neighbours of a distance.
    """
    settings = list(settings)
    for distance in DISTANCES:
        numbers = [number for number, name in settings if name == distance]
        for rows, index in nearest(queries, train.features, max(numbers), distance, dtype, device) if numbers else ():
            blocks = train.labels[index]
            yield rows, {(k, distance): blocks[:, :k].mode(dim=1).values for k in numbers}


def regression(train: Samples, device: torch.device | str = "cpu") -> Callable[[float], Any]:
    """Fits logistic regressions of the blocks' most frequent labels: C -> an estimator with `predict`.

    By cuML on CUDA if it is installed, else by scikit-learn. FastmumError: neither is, or all labels are the same.
    """
    features, labels = train.features.numpy(), block_modes(train.labels).numpy()
    if len(np.unique(labels)) < 2:
        raise FastmumError("logistic regression needs patches of two labels to train on")
    more: dict[str, Any] = {}
    if torch.device(device).type == "cuda":
        try:
            from cuml.linear_model import LogisticRegression
        except ImportError:
            log.warning("cuML is not installed: logistic regression by scikit-learn on the CPU")
        else:
            more = {"linesearch_max_iter": LINE_SEARCH, "output_type": "numpy"}
    if not more:
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            raise FastmumError("logistic regression needs scikit-learn: pip install 'fastmum[recognition]'") from None

    def fit(C: float) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the tolerance was not reached
            estimator = LogisticRegression(C=C, max_iter=MAX_ITERATIONS, tol=TOLERANCE, **more)
            return estimator.fit(features, labels)

    return fit


class Fitted(NamedTuple):
    """A classifier with the setting that is best on the validation samples."""

    setting: Setting
    validation: dict[Setting, Scores]  # of every setting
    predict: Callable[[Tensor], Tensor]  # features (N, D) -> blocks (N, L), after fitting to train and validation


def select_knn(
    train: Samples, validation: Samples, ignore: Sequence[int], dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", neighbours: Sequence[int] = NEIGHBOURS,
) -> Fitted:  # fmt: skip
    """k-NN by the mIoU on `validation`; `predict` searches both."""
    settings = list(itertools.product(neighbours, DISTANCES))
    confused = dict.fromkeys(settings, torch.zeros(LABELS, LABELS, dtype=torch.int64))
    total = len(DISTANCES) * -(-len(validation.features) // QUERIES)
    found = knn(train.fitted(ignore), validation.features, settings, dtype, device)
    for rows, blocks in progress_bar(found, desc="k-NN", unit="batch", total=total, leave=False):
        for setting, block in blocks.items():
            confused[setting] = confused[setting] + confusion(validation.labels[rows], block)
    scores = {setting: scores_of(counts, ignore) for setting, counts in confused.items()}
    best = max(settings, key=lambda setting: scores[setting].miou)
    both = train.joined(validation).fitted(ignore)

    def predict(features: Tensor) -> Tensor:
        found = (blocks[best] for _, blocks in knn(both, features, [best], dtype, device))
        total = -(-len(features) // QUERIES)
        return torch.cat([*progress_bar(found, desc="k-NN", unit="batch", total=total, leave=False)])

    return Fitted(best, scores, predict)


def select_regression(
    train: Samples, validation: Samples, ignore: Sequence[int], device: torch.device | str = "cpu",
    penalties: Sequence[float] = INVERSE_PENALTIES,
) -> Fitted:  # fmt: skip
    """Logistic regression by the mIoU on `validation`; `predict` is fitted to both."""
    fit, scores = regression(train.fitted(ignore), device), dict[Setting, Scores]()
    length = train.labels.shape[1]

    def blocks(estimator: Any, features: Tensor) -> Tensor:
        label = torch.from_numpy(np.asarray(estimator.predict(features.numpy())))
        return label.to(torch.uint8)[:, None].expand(-1, length)

    for C in progress_bar(penalties, desc="logistic regression", unit="fit", leave=False):
        predicted = blocks(fit(C), validation.features)
        scores[(C,)] = scores_of(confusion(validation.labels, predicted), ignore)
    best = max(scores, key=lambda setting: scores[setting].miou)
    estimator = regression(train.joined(validation).fitted(ignore), device)(best[0])
    return Fitted(best, scores, lambda features: blocks(estimator, features))
