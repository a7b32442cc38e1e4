"""Sets of images with maps of labels: the layouts that `--data` of the evaluation `segmentation` names."""

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.io import loadmat

from fastmum.data.decode.image import FrameError, read_header
from fastmum.data.errors import DataError
from fastmum.evaluate.pairs import scenes
from fastmum.files import expand_user
from fastmum.scenes.labels import CLASSES, ensure_labels
from fastmum.tasks.recognition.files import DataSet, File

log = logging.getLogger(__name__)

VOC_ARCHIVE = "VOCtrainval_11-May-2012"
SBD = "benchmark_RELEASE/dataset", "aug/benchmark_RELEASE/dataset", "sbd", "SBD"
VOID = 255  # the label of pixels that are not scored
EVERY = 3  # views of a rendered scene: neighbours are much alike


class Mapped(NamedTuple):
    """An image and its labels; None if it has none."""

    file: File
    label: File | None


@dataclass
class MapSet:
    """Images to train on and to test on, and their labels."""

    name: str
    most: int  # the largest label, besides 255
    ignore: tuple[int, ...]  # labels of pixels that are not scored
    train: list[Mapped]
    test: list[Mapped]
    groups: list[str] | None = None  # of `train`: images of a group are not split; None: each by itself
    half: bool = False  # CAPI compares neighbours in bfloat16


def open_maps(data: str) -> MapSet:
    """A set by its name: "scenes", or KIND:/path; DataError if it cannot be read."""
    kind, colon, path = data.partition(":")
    if data == "scenes":
        return rendered()
    if not colon or kind not in LAYOUTS:
        raise DataError(f"--data is '{data}', but must be scenes, or KIND:PATH with {', '.join(LAYOUTS)}")
    found = LAYOUTS[kind](DataSet(expand_user(path)))
    for part in ("train", "test"):
        if not getattr(found, part):
            raise DataError(f"'{path}' has no {part} images of {kind}: see docs/recognition.md for its layout")
    return found


def rendered() -> MapSet:
    """The solids of the rendered rooms; training and test share no room. The sky is not scored."""
    parts, groups = dict[str, list[Mapped]](), list[str]()
    for part in ("train", "test"):
        parts[part] = []
        for folder in scenes.embedded_folders(part):
            labels = ensure_labels(folder)[::EVERY]
            for label in labels:
                names = f"{folder.name}/{label.name}", f"{folder.name}/label/{label.name}"
                parts[part].append(Mapped(*(File(name, str(folder.parent)) for name in names)))
            groups += [folder.name] * len(labels) if part == "train" else []
    return MapSet("scenes", len(CLASSES) - 1, (0, VOID), parts["train"], parts["test"], groups)


def ade20k(data: DataSet) -> MapSet:
    """ADEChallengeData2016: images and annotations of training and validation; 0 is unlabelled."""
    parts = []
    for part in ("training", "validation"):
        images, labels = (
            data.files(*(f"{root}{kind}/{part}" for root in ("ADEChallengeData2016/", "")))
            for kind in ("images", "annotations")
        )
        by_stem = {Path(file.name).stem: file for file in labels}
        parts.append([Mapped(file, by_stem.get(Path(file.name).stem)) for file in images])
    return MapSet("ade20k", 150, (0, VOID), parts[0], parts[1], half=True)


def voc(data: DataSet) -> MapSet:
    """VOC 2012, to train also SBD's images that VOC does not test on (10,582 in all), if SBD is there."""
    roots = ("VOCdevkit/VOC2012", f"{VOC_ARCHIVE}/VOCdevkit/VOC2012", "original/VOCdevkit/VOC2012", "VOC2012", ".")
    found = (
        (root, [data.text(f"{root}/ImageSets/Segmentation/{part}.txt") for part in ("train", "val")]) for root in roots
    )
    root, texts = next(((root, texts) for root, texts in found if all(texts)), ("", []))
    if not texts:
        raise DataError(f"'{data.root}' has no VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt and val.txt")
    find, ids = data.lookup(root), [(text or "").split() for text in texts]
    train, test = (
        [Mapped(find(f"JPEGImages/{name}.jpg"), find(f"SegmentationClass/{name}.png")) for name in names]
        for names in ids
    )
    for sbd in SBD:
        texts = [data.text(f"{sbd}/{part}.txt") for part in ("train", "val")]
        if all(texts):
            find, known = data.lookup(sbd), {*chain(*ids)}
            names = [name for text in texts for name in (text or "").split() if name not in known]
            train += [Mapped(find(f"img/{name}.jpg"), find(f"cls/{name}.mat")) for name in names]
            break
    else:
        missing = f"SBD, with which there are 10,582, is not in {SBD[0]}{data.compressed('benchmark')}"
        log.warning("voc: %d images to train on; %s", len(train), missing)
    return MapSet("voc", 20, (VOID,), train, test)


def read_label(mapped: Mapped, image: Image.Image, most: int) -> np.ndarray:
    """The labels of an image, (H, W) uint8; FrameError: there are none, of another size, or out of range."""
    if mapped.label is None:
        raise FrameError("it has no labels")
    content = mapped.label.read()
    if mapped.label.name.endswith(".mat"):
        try:
            label = loadmat(io.BytesIO(content))["GTcls"][0]["Segmentation"][0].astype(np.uint8)
        except Exception as error:  # scipy's reader raises anything on damaged files
            raise FrameError(f"its labels cannot be read ({error})") from None
    else:
        opened = read_header(content).image
        if opened.mode not in ("P", "L"):
            raise FrameError(f"its labels are an image of mode {opened.mode}, not of 8 bits")
        try:
            label = np.array(opened)
        except Exception as error:  # Pillow's readers do as well
            raise FrameError(f"its labels cannot be read ({error})") from None
    if label.shape != image.size[::-1]:
        raise FrameError(
            f"its labels are {label.shape[1]} x {label.shape[0]} pixels, but it is {image.width} x {image.height}"
        )
    if (wrong := label[(label > most) & (label != VOID)]).size:
        raise FrameError(f"it has the label {wrong[0]}, but labels are 0 to {most}, and {VOID}")
    return label


LAYOUTS: dict[str, Callable[[DataSet], MapSet]] = {"ade20k": ade20k, "voc": voc}
