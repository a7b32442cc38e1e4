"""Monocular depth by linear heads on frozen tokens: all heads, learning rates and weight decays trained in one pass.

Each step encodes its images once for all heads. docs/evaluation.md describes the protocol.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastmum.data.errors import DataError
from fastmum.data.samples import Frame
from fastmum.errors import some_reasons
from fastmum.evaluate.depth_sets import DepthSet, read_view, scored_view, train_view
from fastmum.evaluate.matching import check_sweep, split_scenes
from fastmum.evaluate.pairs.pair import evenly
from fastmum.features import FeatureCache
from fastmum.geometry import View
from fastmum.geometry.metrics import DEPTH_METRICS, depth_metrics, mean_metrics
from fastmum.model.encoder import Encoder
from fastmum.progress import progress_bar
from fastmum.tasks.depth import (
    HEADS,
    MEAN_ONLY,
    DepthHead,
    EncodedImages,
    Loss,
    feature_blocks,
    fit_patches,
    learning_rate_factor,
    momentum,
    predict_depth,
    resize,
)
from fastmum.tasks.pictures import colours

CLIP = 35.0  # norm of the gradient of a head
THREADS = 8  # that read images
WORST = 0.5  # relative error that is drawn in the last colour
GAP = 6  # pixels between the images of a picture


@dataclass(frozen=True)
class DepthSettings:
    """Training of the heads: steps and batch of DINOv2, whose learning rate and decay are the first ones.

    Every combination of a head, a learning rate and a weight decay is trained. DINOv3's are 3e-4 and 1e-4;
    1e-2 is for the few steps that a CPU can do. A value out of range is a ValueError that starts with the field.
    """

    steps: int = 38_400
    batch: int = 16  # images: 2 on each of 8 devices
    heads: tuple[str, ...] = ("lin1", "lin4")  # of `HEADS`
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 1e-2)
    weight_decays: tuple[float, ...] = (1e-2, 1e-4)
    loss: Loss = "sig"
    versions: int = 0  # augmented versions of each training image that are used in turn; 0: a new one each time
    seed: int = 0

    def __post_init__(self) -> None:
        check_sweep(self)
        if self.versions < 0:
            raise ValueError(f"versions is {self.versions}, but must be at least 0")
        if not self.heads or not set(self.heads) <= {*HEADS}:
            raise ValueError(f"heads are {list(self.heads)}, but must be of {', '.join(HEADS)}")


class Candidate(NamedTuple):
    """A trained head."""

    name: str  # of `HEADS`
    learning_rate: float
    weight_decay: float
    head: DepthHead

    def about(self) -> dict[str, Any]:
        """For JSON."""
        return {"head": self.name, "learning_rate": self.learning_rate, "weight_decay": self.weight_decay}


class DepthResult(NamedTuple):
    """The result of `evaluate_depth`."""

    numbers: dict[str, Any]
    pictures: list[Image.Image]
    best: Candidate
    longest: int  # longer side of the test images, pixels


def open_cache(folder: Path, encoder: Encoder) -> FeatureCache:
    """The cache of the tokens that heads read."""
    return FeatureCache(folder, encoder, {"blocks": feature_blocks(encoder.config.depth), "norm": False, "cls": True})


def evaluate_depth(
    encoder: Encoder, test: DepthSet, train: DepthSet, settings: DepthSettings | None = None,
    choose_on_train: bool = True, cache: FeatureCache | None = None, most: int | None = None, pictures: int = 0,
) -> DepthResult:  # fmt: skip
    """Train heads on one set and score all of them on another one, image by image.

    The best head has the least RMSE on every sixth scene of `train`, which is not trained on, or without
    `choose_on_train` on the test images, which favours it. "scores" are the means over images of its `depth_metrics`,
    "by_head" those of the best one of each of `settings.heads`.

    Args:
        cache: of `open_cache`; training images are kept there if they have a number of versions.
        most: test images, evenly spread.
        pictures: test images that are drawn.

    DataError: no image can be used, too few scenes to choose on, or the encoder has no CLS that a head needs.
    FloatingPointError: all diverged.
    """
    settings = settings or DepthSettings()
    if any(HEADS[name].cls for name in settings.heads) and not encoder.options.cls:
        raise DataError("the encoder has no CLS token: use --heads lin1-nocls lin4-nocls")
    kept, choice = train, None
    if choose_on_train:
        scenes = [str(Path(frame.key).parent) for frame in train.frames]
        kept, choice = (replace(train, frames=f) for f in split_scenes(train.frames, scenes, train.name))
    frames = evenly(test.frames, most)
    for data, some in ((test, frames), (choice, choice.frames if choice else [])):
        if data and next(_scored_views(data, some), None) is None:  # before the training
            raise _nothing("scored", data)
    candidates, losses = train_heads(encoder, kept, settings, cache)
    heads = [each.head for each in candidates]
    scored = score_heads(heads, encoder, test, frames, cache)
    chosen = score_heads(heads, encoder, choice, choice.frames, cache) if choice else scored
    errors = [mean_metrics([image[i] for image in chosen.values()])["rmse"] for i in range(len(heads))]
    order = sorted(range(len(heads)), key=lambda i: errors[i] if isfinite(errors[i]) else inf)
    best = order[0]
    if not isfinite(errors[best]):
        raise FloatingPointError("all heads diverged: lower the learning rates")
    rows = []
    for i, (each, loss) in enumerate(zip(candidates, losses, strict=True)):
        rows.append(each.about() | _finite({"train_loss": loss, **mean_metrics([s[i] for s in scored.values()])}))
    about = asdict(settings) | {"train_set": train.name, "train_images": len(kept.frames)}
    about |= {"size": test.protocol.longest, "max_depth": train.protocol.max_depth}
    about |= {"chosen_on": "left-out training scenes" if choice else "test images"}
    scores = [{name: row[name] for name in DEPTH_METRICS} for row in rows]
    numbers = {
        "pairs": len(scored), "set_pairs": len(test.frames), "scores": scores[best],
        "by_head": {name: scores[next(i for i in order if candidates[i].name == name)] for name in settings.heads},
        "best": candidates[best].about(), "heads": rows, "settings": about,
        "per_image": {key: _finite(metrics[best]) for key, metrics in scored.items()},
        "skipped": {"test": test.skipped, "train": kept.skipped},
    }  # fmt: skip
    drawn, longest = [], 0
    for frame in evenly([frame for frame in frames if frame.key in scored], max(1, pictures)):
        image, true = scored_view(read_view(frame), test.protocol)
        longest = max(longest, *image.shape[:2])
        drawn.append(draw_depth(image, true, predict_depth([heads[best]], encoder, image, cache)[0].numpy()))
    return DepthResult(numbers, drawn[:pictures], candidates[best], longest)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if isfinite(value) else None for name, value in values.items()}


def train_heads(
    encoder: Encoder, data: DepthSet, settings: DepthSettings, cache: FeatureCache | None = None
) -> tuple[list[Candidate], list[float]]:
    """All heads in eval mode, and the mean loss of each in the last tenth of the steps. Raises DataError."""
    device, steps, candidates = next(encoder.parameters()).device, settings.steps, []
    with torch.random.fork_rng(devices=[]):
        for sizes in itertools.product(settings.heads, settings.learning_rates, settings.weight_decays):
            torch.manual_seed(settings.seed)
            head = DepthHead.of(encoder, HEADS[sizes[0]], data.protocol.max_depth, settings.loss)
            candidates.append(Candidate(*sizes, head))
    groups: list[dict[str, Any]] = [
        {"params": list(each.head.parameters()), "weight_decay": each.weight_decay} for each in candidates
    ]
    optimizer, total, counted = torch.optim.AdamW(groups, fused=True), torch.zeros(len(candidates), device=device), 0
    images = itertools.islice(batches(data, settings, encoder), steps)
    bar = progress_bar(images, desc=f"{len(candidates)} heads", unit="step", total=steps)
    for step, (pixels, true) in enumerate(bar):
        for group, each in zip(optimizer.param_groups, candidates, strict=True):
            group["lr"] = each.learning_rate * learning_rate_factor(step, steps)
            group["betas"] = momentum(step, steps), each.head.kind.beta2
        encoded, true = EncodedImages(encoder, pixels, cache if settings.versions else None), true.to(device)
        losses = []
        for each in candidates:
            loss = each.head.losses(each.head(*encoded.of(each.head.kind)), true, step < MEAN_ONLY * steps)
            loss.backward()
            nn.utils.clip_grad_norm_(each.head.parameters(), CLIP)
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        if step >= 0.9 * (steps - 1):
            total, counted = total + torch.stack(losses), counted + 1
    for each in candidates:
        each.head.eval()
    return candidates, (total / counted).tolist()


def batches(data: DepthSet, settings: DepthSettings, encoder: Encoder) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, H, W, 3) uint8 and depth (B, 1, H, W) without end, in random permutations of the frames.

    Frames that cannot be used are noted in `data.skipped`, and others take their place; DataError if all are.
    """

    def draws() -> Iterator[tuple[int, int]]:
        order = np.random.default_rng(settings.seed)
        for epoch in itertools.count():
            version = epoch % settings.versions if settings.versions else epoch
            yield from ((int(i), version) for i in order.permutation(len(data.frames)))

    def load(index: int, version: int) -> View | DataError:
        try:
            view = read_view(data.frames[index])
            rng = np.random.default_rng((settings.seed, index, version))
            return fit_patches(train_view(view, data.protocol, rng), encoder)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        stream, pending, ready, failed = draws(), deque[tuple[int, Future[View | DataError]]](), list[View](), 0
        while True:
            while len(pending) < 2 * settings.batch:
                index, version = next(stream)
                pending.append((index, pool.submit(load, index, version)))
            index, future = pending.popleft()
            view = future.result()
            if isinstance(view, DataError):
                data.skipped[data.frames[index].key] = str(view)
                failed += 1
                if failed >= len(data.frames):
                    raise _nothing("trained on", data)
                continue
            failed, ready = 0, [*ready, view]
            if len(ready) == settings.batch:
                if len({each.size for each in ready}) > 1:
                    raise DataError(f"images of '{data.name}' have several sizes, which cannot be trained on together")
                arrays = ([each.image for each in ready], [each.depth for each in ready if each.depth is not None])
                images, depths = (torch.from_numpy(np.stack(each)) for each in arrays)
                yield images, depths[:, None]
                ready = []


def score_heads(
    heads: list[DepthHead], encoder: Encoder, data: DepthSet, frames: list[Frame], cache: FeatureCache | None = None
) -> dict[str, list[dict[str, float]]]:
    """The `depth_metrics` of every head by the keys of frames; those that cannot be used are noted in `data.skipped`.

    DataError if that is all of them.
    """
    protocol, found = data.protocol, dict[str, list[dict[str, float]]]()
    bar = progress_bar(frames, desc=f"depth of {data.name}", unit="image", leave=False)
    for key, image, true in _scored_views(data, bar):
        depths = predict_depth(heads, encoder, image, cache)
        depths = resize(depths[:, None], true.shape)[:, 0].clamp(max=protocol.cap or inf)
        limits = protocol.max_depth, 1e-3, protocol.crop
        metrics = [depth_metrics(depth.numpy(), true, *limits) for depth in depths]
        if all(np.isnan(each["rmse"]) for each in metrics):
            data.skipped[key] = "no valid depth in the part that is scored"
        else:
            found[key] = metrics
    if not found:
        raise _nothing("scored", data)
    return found


def _scored_views(data: DepthSet, frames: Iterable[Frame]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Keys, images and true depth of the frames that can be read; the others are noted in `data.skipped`."""
    for frame in frames:
        try:
            yield frame.key, *scored_view(read_view(frame), data.protocol)
        except DataError as error:
            data.skipped[frame.key] = str(error)


def _nothing(done: str, data: DepthSet) -> DataError:
    return DataError(f"no image of '{data.name}' can be {done}: {some_reasons(data.skipped, 1)}")


def draw_depth(image: np.ndarray, true: np.ndarray, depth: np.ndarray) -> Image.Image:
    """An image with its true depth, the predicted one and the relative error; white where the truth is unknown."""
    known, size = true > 0, image.shape[1::-1]
    low, high = np.percentile(true[known], [2, 98]) if known.any() else (0, 1)
    found = resize(torch.from_numpy(depth)[None, None], true.shape)[0, 0].numpy()
    error = np.abs(found - true) / np.maximum(true, 1e-6)
    maps = [np.where(known[..., None], colours(true, low, high), 255), colours(found, low, high)]
    maps.append(np.where(known[..., None], colours(error, 0, WORST), 255))
    row = Image.new("RGB", (4 * size[0] + 3 * GAP, size[1]), "white")
    for i, each in enumerate([image, *maps]):
        row.paste(Image.fromarray(np.uint8(each)).resize(size), (i * (size[0] + GAP), 0))
    return row
