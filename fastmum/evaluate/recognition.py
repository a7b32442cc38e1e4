"""Recognition with frozen features, CAPI's protocol: classes of images by probes, segmentation by k-NN and regression.

Both choose on a tenth of the training images and are scored on the test images once.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmum.data.decode.image import read_header, rgb
from fastmum.data.errors import DataError
from fastmum.errors import some_reasons
from fastmum.evaluate.features import check_size, patch_size
from fastmum.evaluate.images import ImageSet, Labelled
from fastmum.evaluate.maps import VOID, Mapped, MapSet, read_label
from fastmum.evaluate.pairs.pair import evenly
from fastmum.evaluate.pictures import labelled_row
from fastmum.evaluate.records import Scored
from fastmum.features import FeatureCache
from fastmum.model.encoder import Encoder
from fastmum.progress import progress_bar
from fastmum.tasks.recognition.features import Batch, Transform, View, centre, load, random_crop, squashed, stream
from fastmum.tasks.recognition.probes import (
    SOURCES,
    ClassifierSettings,
    Probes,
    Weights,
    any_match,
    logits_of,
    schedule,
    sources_of,
    visits,
)
from fastmum.tasks.recognition.segment import (
    Fitted,
    Samples,
    Setting,
    confusion,
    label_blocks,
    scores_of,
    select_knn,
    select_regression,
    standardiser,
)

COLOURS = 256  # of labels in pictures


def evaluate_recognition(
    encoder: Encoder, images: ImageSet, settings: ClassifierSettings, size: int = 224, crops: int | None = None,
    most: int | None = None, cache: Path | None = None, pictures: int = 0,
) -> Scored:  # fmt: skip
    """Train linear and attentive probes on frozen features, choose one of each source, and score it on the test images.

    Scores are top-1 accuracies in percent by source; an image with several labels is right if the class is one of them.

    Args:
        size: side of the images in pixels.
        crops: random crops of each training image, of which features are computed once; None: a new one each time, as
            CAPI does.
        most: test images, evenly spread.
        cache: folder for features, of all images but those of crops None. Without it, those of `crops` are in a
            temporary folder.
        pictures: test images that are drawn.

    DataError: no readable image, or features that are not finite. FastmumError: the width is no multiple of 64.
    """
    check_size(encoder, size)
    skipped: dict[str, str] = {}
    labels = [each.labels for each in images.train]
    parts = split_by_class(images.groups, labels) if images.groups else split([*map(str, range(len(labels)))], "images")
    train, validation = ([images.train[i] for i in part] for part in parts)
    test = evenly(images.test, most)
    labelled = [each for each in test if each.labels]
    middle = centre(size)

    def view(each: Labelled, transform: Transform, name: str) -> View:
        return View(each.file, transform, name, lambda image: each.labels)

    def training() -> Iterator[View]:
        for i, before in visits(len(train), settings.seed):
            seed = settings.seed, i, before % crops if crops else before
            yield view(train[i], random_crop(size, seed), f"crop {size} {seed}")

    def scored_on(
        weights: dict[str, Weights], some: Sequence[Labelled], cache: FeatureCache | None
    ) -> dict[str, Tensor]:
        views = [view(each, middle, f"centre {size}") for each in some]
        parts = [views[i : i + settings.batch] for i in range(0, len(views), settings.batch)]
        found = stream(encoder, parts, cache, skipped)
        return _matches(weights, progress_bar(found, total=len(parts), desc="scoring", unit="batch", leave=False))

    for part, some in (("training", train), ("validation", validation), ("test", labelled)):
        _check_readable(f"{part} images of '{images.name}'", (view(each, middle, "") for each in some), images.hint)
    with tempfile.TemporaryDirectory(prefix="fastmum-") as folder:
        kept = FeatureCache(cache or Path(folder), encoder, {"task": "recognition", "norm": True})
        drawn = training()
        batches = ([*islice(drawn, settings.batch)] for _ in range(settings.steps))
        probes = _train(stream(encoder, batches, kept if crops else None, skipped), len(images.classes), settings)
        right = scored_on(probes.weights, validation, kept if cache else None)
        chosen = {source: int(found.double().mean(0).argmax()) for source, found in right.items()}
        weights = probes.keep(chosen)
        found = scored_on(weights, labelled, kept if cache else None)
    scored = len(next(iter(found.values())))
    best = {source: probes.heads[source][i] for source, i in chosen.items()}
    numbers = {
        "pairs": scored, "set_pairs": len(images.test),
        "scores": {f"top1_{source}": 100 * each.double().mean().item() for source, each in found.items()},
        "best": {source: f"{head.learning_rate:g}, {head.weight_decay:g}" for source, head in best.items()},
        "heads": [
            {**head._asdict(), "top1_validation": 100 * value}
            for source, heads in probes.heads.items()
            for head, value in zip(heads, right[source].double().mean(0).tolist(), strict=True)
        ],
        "settings": {
            "size": size, "steps": settings.steps, "batch": settings.batch, "seed": settings.seed,
            "crops": crops or "new ones", "train_images": len(train), "validation_images": len(validation),
            "classes": len(images.classes), "classes_without_images": len(images.empty),
        },
        "skipped": skipped, "not_scored": len(test) - scored,
    }  # fmt: skip
    few = evenly(labelled, pictures) if pictures else []
    return Scored(numbers, _draw_classes(encoder, weights, few, images.classes, middle))


def _check_readable(what: str, views: Iterable[View], hint: str = "") -> None:
    """Raise a DataError if no image can be read: one error before the encoder starts."""
    reasons = dict[str, str]()
    for view in views:
        if not isinstance(found := load(view, True), str):
            return
        reasons[view.file.path] = found
    raise DataError(f"no {what} can be read: {some_reasons(reasons, 1)}{hint}")


def split(groups: Sequence[str], kind: Literal["images", "maps"]) -> tuple[list[int], list[int]]:
    """Indices of training and validation by CAPI's permutations: the last tenth of the images, or the first of maps.

    `groups` are names: those of one name stay together. DataError: there are fewer than two.
    """
    members: dict[str, list[int]] = {}
    for i, name in enumerate(groups):
        members.setdefault(name, []).append(i)
    count, places = len(members), list(members.values())
    if count < 2:
        raise DataError("there are fewer than two training images, but a part of them is needed to choose on")
    if kind == "images":
        order = np.random.default_rng(42).permutation(count)
        cut = min(round(0.9 * count), count - 1)
        parts = order[:cut], order[cut:]
    else:
        order = np.random.RandomState(0).permutation(count)
        cut = max(count // 10, 1)
        parts = order[cut:], order[:cut]
    train, validation = ([i for place in part.tolist() for i in places[place]] for part in parts)
    return train, validation


def split_by_class(groups: Sequence[str], labels: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """`split` of the images of each class, if it has two groups, else of all.

    Among a tenth of few groups one class may be frequent, and an untrained head that always names it would be chosen.
    """
    train, validation = list[int](), list[int]()
    for label in dict.fromkeys(map(tuple, labels)):
        own = [i for i, each in enumerate(labels) if tuple(each) == label]
        some = [groups[i] for i in own]
        kept, out = split(some, "images") if len({*some}) > 1 else (range(len(own)), [])
        train += [own[i] for i in kept]
        validation += [own[i] for i in out]
    return (train, validation) if validation else split(groups, "images")


def _train(batches: Iterable[Batch], classes: int, settings: ClassifierSettings) -> Probes:
    probes = None
    factors = schedule(settings.steps, settings.steps // 10)
    bar = progress_bar(batches, desc="probes", unit="step", total=settings.steps)
    for batch, factor in zip(bar, factors, strict=False):
        features = sources_of(batch.cls, batch.patch)
        if probes is None:
            widths = {source: x.shape[-1] for source, x in features.items()}
            heads = settings.heads([source for source in SOURCES if source in features])
            probes = Probes(heads, widths, classes, settings.batch, settings.seed, batch.patch.device)
        labels = torch.tensor([each[0] for each in batch.labels], device=batch.patch.device)
        probes.step(features, labels, factor)
    if probes is None:
        raise DataError("no training image that was drawn can be read: take more --steps")
    return probes


@torch.no_grad()
def _matches(weights: dict[str, Weights], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Whether the heads are right on the images with labels, (images, Q) bool on the CPU by source."""
    found: dict[str, list[Tensor]] = {source: [] for source in weights}
    for batch in batches:
        most = max(map(len, batch.labels), default=0) or 1
        labels = torch.tensor([[*each, *[-1] * (most - len(each))] for each in batch.labels], device=batch.patch.device)
        for source, logits in logits_of(weights, sources_of(batch.cls, batch.patch)).items():
            found[source].append(any_match(logits, labels).cpu())
    if not any(len(each) for each in next(iter(found.values()))):
        raise DataError("no image to score can be read any more")
    return {source: torch.cat(each) for source, each in found.items()}


@torch.no_grad()
def _draw_classes(
    encoder: Encoder, best: dict[str, Weights], few: list[Labelled], classes: list[str], middle: Transform
) -> list[Image.Image]:
    """Test images under the class of the attentive probe and the true one."""
    named = []
    for each in few:
        for tokens in stream(encoder, [[View(each.file, middle, "")]], None, {}):
            number = int(logits_of(best, sources_of(tokens.cls, tokens.patch))[SOURCES[0]][0, :, 0].argmax())
            mark = "" if number in each.labels else f" (is {classes[each.labels[0]]})"
            named.append((classes[number] + mark, middle(rgb(read_header(each.file.read())))))
    return [labelled_row(named)] if named else []


def evaluate_segmentation(
    encoder: Encoder, maps: MapSet, size: int = 224, most: int | None = None, train_images: int | None = None,
    cache: Path | None = None, batch: int = 32, pictures: int = 0,
) -> Scored:  # fmt: skip
    """Fit k nearest neighbours and logistic regression to patches, each chosen on a tenth of the training images.

    Scores are those of `segment.Scores` in percent, on the test images squashed to size x size pixels.

    Args:
        most, train_images: images to test and to train on, evenly spread; None: all.
        cache: folder for features.
        batch: images encoded at once.

    DataError: no readable image, or features that are not finite. FastmumError: scikit-learn and cuML are missing.
    """
    check_size(encoder, size)
    device, skipped = next(encoder.parameters()).device, dict[str, str]()
    kept = None if cache is None else FeatureCache(cache, encoder, {"task": "segmentation", "norm": True})
    numbered = evenly([*enumerate(maps.train)], train_images)
    some = [each for _, each in numbered]
    groups = [maps.groups[i] if maps.groups else str(i) for i, _ in numbered]
    train, validation = ([some[i] for i in part] for part in split(groups, "maps"))
    test = evenly(maps.test, most)
    views = {name: [_squashed_view(maps, each, size, patch_size(encoder)) for each in part]
             for name, part in (("training", train), ("validation", validation), ("test", test))}  # fmt: skip
    for name, part in views.items():
        _check_readable(f"{name} images of '{maps.name}'", part)
    parts, read = {}, list[Mapped]()
    for name, part in views.items():
        parts[name], read = _samples(encoder, part, batch, kept, skipped, name)
    standardise = standardiser(parts["training"].features)
    for samples in parts.values():
        standardise(samples.features)
    half = torch.bfloat16 if maps.half and device.type == "cuda" else torch.float32
    fitted: dict[str, Fitted] = {
        "knn": select_knn(parts["training"], parts["validation"], maps.ignore, half, device),
        "logreg": select_regression(parts["training"], parts["validation"], maps.ignore, device),
    }
    blocks = {name: each.predict(parts["test"].features) for name, each in fitted.items()}
    found = {name: scores_of(confusion(parts["test"].labels, each), maps.ignore) for name, each in blocks.items()}
    side = size // patch_size(encoder)
    scores = {f"{name}_miou": 100 * each.miou for name, each in found.items()}
    scores |= {f"{name}_accuracy": 100 * each.accuracy for name, each in found.items()}
    scores |= {f"{name}_ignored": each.ignored for name, each in found.items()}
    numbers = {
        "pairs": len(read), "set_pairs": len(maps.test), "scores": scores,
        "best": {name: _text(each.setting) for name, each in fitted.items()},
        "validation": {
            name: {_text(setting): 100 * each.miou for setting, each in one.validation.items()}
            for name, one in fitted.items()
        },
        "settings": {
            "size": size, "train_images": len(train), "validation_images": len(validation),
            "ignored_labels": list(maps.ignore), "dtype_of_neighbours": str(half).removeprefix("torch."),
        },
        "skipped": skipped, "not_scored": len(test) - len(read),
    }  # fmt: skip
    drawn = [
        _draw_maps(maps, each, size, {name: _whole(b, i, side) for name, b in blocks.items()})
        for i, each in (evenly([*enumerate(read)], pictures) if pictures else ())
    ]
    return Scored(numbers, drawn)


def _text(setting: Setting) -> str:
    return " ".join(each if isinstance(each, str) else f"{each:g}" for each in setting)


def _squashed_view(maps: MapSet, each: Mapped, size: int, patch: int) -> View:
    def label(image: Image.Image) -> tuple[Mapped, Tensor]:
        nearest = Image.fromarray(read_label(each, image, maps.most)).resize((size, size), Image.Resampling.NEAREST)
        return each, torch.from_numpy(label_blocks(np.array(nearest), patch))

    return View(each.file, squashed(size), f"squashed {size}", label)


def _samples(
    encoder: Encoder, views: Sequence[View], batch: int, cache: FeatureCache | None, skipped: dict[str, str], part: str
) -> tuple[Samples, list[Mapped]]:
    """Patches of the images that can be read, and these images."""
    batches = [views[i : i + batch] for i in range(0, len(views), batch)]
    found = stream(encoder, batches, cache, skipped)
    features, labels = [], []
    for tokens in progress_bar(found, total=len(batches), desc=f"encoding {part} images", leave=False):
        features.append(tokens.patch.flatten(0, 1).cpu())
        labels += tokens.labels
    if not features:
        raise DataError(f"no {part} image can be read any more")
    read, blocks = zip(*labels, strict=True)
    return Samples(torch.cat(features), torch.cat(blocks)), [*read]


def _whole(blocks: Tensor, i: int, side: int) -> np.ndarray:
    """Labels (H, W) of image i from the blocks of all images."""
    patch = round(blocks.shape[1] ** 0.5)
    one = blocks[i * side**2 : (i + 1) * side**2].view(side, side, patch, patch)
    return one.transpose(1, 2).reshape(side * patch, side * patch).numpy()


def _draw_maps(maps: MapSet, each: Mapped, size: int, predicted: dict[str, np.ndarray]) -> Image.Image:
    """An image, its labels and the predicted ones; labels that are not scored are black."""
    image = rgb(read_header(each.file.read()))
    truth = Image.fromarray(read_label(each, image, maps.most)).resize((size, size), Image.Resampling.NEAREST)
    palette = np.random.default_rng(0).integers(40, 256, (COLOURS, 3), np.uint8)
    palette[[*maps.ignore, VOID]] = 0
    titles = {"knn": "k-NN", "logreg": "logistic regression"}
    named = [(titles[name], Image.fromarray(palette[labels])) for name, labels in predicted.items()]
    return labelled_row(
        [("image", squashed(size)(image)), ("labels", Image.fromarray(palette[np.array(truth)])), *named]
    )
