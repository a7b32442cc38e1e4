"""Sets of classified images: the layouts that `--data` of the evaluation `recognition` names."""

import io
import json
import logging
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from scipy.io import loadmat

from fastmum.data.errors import DataError, reading
from fastmum.errors import some_names
from fastmum.evaluate.pairs import scenes
from fastmum.files import expand_user, read_json
from fastmum.scenes.layout import KINDS as ROOMS
from fastmum.tasks.recognition.files import DataSet, File

log = logging.getLogger(__name__)

KAGGLE = "ILSVRC/Data/CLS-LOC"  # ImageNet-1K as Kaggle has it
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, META = f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt", f"{DEVKIT}/data/meta.mat"


class Labelled(NamedTuple):
    """An image and its classes: none if it has no label, several in lists of annotators."""

    file: File
    labels: tuple[int, ...]


@dataclass
class ImageSet:
    """Images to train on and to test on."""

    name: str
    classes: list[str]
    train: list[Labelled]
    test: list[Labelled]
    groups: list[str] | None = None  # of `train`: images of a group are not split; None: each by itself
    empty: list[str] = field(default_factory=list)  # classes without a training image
    hint: str = ""  # for errors of images that cannot be read


def open_images(data: str) -> ImageSet:
    """A set by its name: "scenes", KIND:/path, or a path with class folders; DataError if it cannot be read."""
    kind, colon, path = data.partition(":")
    if data == "scenes":
        return rendered()
    if colon and kind not in LAYOUTS:
        raise DataError(f"--data is '{data}', but must be scenes, a folder, or KIND:PATH with {', '.join(LAYOUTS)}")
    root = expand_user(path if colon else data)
    if not colon and not root.exists():
        raise DataError(f"--data is '{data}', but there is no such folder; other sets: scenes, {', '.join(LAYOUTS)}")
    found = LAYOUTS[kind if colon else "folder"](DataSet(root))
    found.name = kind if colon and kind != "folder" else f"{root.resolve().name} (folder)"
    if found.empty:
        log.warning(
            "%s: %d classes have no image to train on: %s", found.name, len(found.empty), some_names(found.empty)
        )
    return found


def rendered() -> ImageSet:
    """The kinds of the rendered rooms; training and test share no room."""
    classes, parts, groups = [*ROOMS], dict[str, list[Labelled]](), list[str]()
    for part in ("train", "test"):
        parts[part] = []
        for folder in scenes.embedded_folders(part):
            cameras = read_json(folder / "cameras.json")
            names = [f"{folder.name}/{frame['file']}" for frame in cameras["frames"]]
            label = (classes.index(cameras["kind"]),)
            parts[part] += [Labelled(File(name, str(folder.parent)), label) for name in names]
            groups += [folder.name] * len(names) if part == "train" else []
    return ImageSet("scenes", classes, parts["train"], parts["test"], groups)


def class_folders(data: DataSet, train: Sequence[str], test: Sequence[str]) -> ImageSet:
    """Classes are the folders of the training images, in the order of their names, with images at any depth."""
    files = _training(data, train)
    named = [file.name.partition("/")[0] for file in files if "/" in file.name]
    if len(named) < len(files):
        stray = [file.path for file in files if "/" not in file.name]
        log.warning("%d training images are in no class folder, so they are skipped: %s", len(stray), some_names(stray))
    classes = sorted({*named, *data.folders(*train)})
    number = {name: i for i, name in enumerate(classes)}
    files = sorted((file for file in files if "/" in file.name), key=lambda file: file.name.partition("/")[0])
    tested = data.files(*test)
    if not tested:
        raise DataError(f"'{data.root}' has no images in {' or '.join(test)}{data.compressed(*test)}")
    if unknown := sorted({name for f in tested if (name := _folder(f)) and name not in number}):
        raise DataError(f"'{data.root}' tests on classes that it does not train on: {some_names(unknown)}")
    train_images, test_images = (
        [Labelled(file, (number[name],) if (name := _folder(file)) else ()) for file in some]
        for some in (files, tested)
    )
    return ImageSet("", classes, train_images, test_images, empty=sorted({*classes} - {*named}))


def _training(data: DataSet, folders: Sequence[str]) -> list[File]:
    files = data.files(*folders)
    if not any("/" in file.name for file in files):
        why = f"no class folders with images in {' or '.join(folders)}{data.compressed(*folders)}"
        raise DataError(f"'{data.root}' has {why}")
    return files


def _folder(file: File) -> str:
    return file.name.partition("/")[0] if "/" in file.name else ""


def imagenet(data: DataSet) -> ImageSet:
    """ImageNet-1K: class folders, or the files as distributed. Flat validation images get the lists' labels."""
    train = ("train", f"{KAGGLE}/train", "ILSVRC2012_img_train")
    found = class_folders(data, train, ("val", f"{KAGGLE}/val", "ILSVRC2012_img_val"))
    if any(each.labels for each in found.test):
        return found
    names = _validation(data)
    number = {name: i for i, name in enumerate(found.classes)}
    if unknown := sorted({*names.values()} - {*number}):
        raise DataError(f"'{data.root}' tests on classes that it does not train on: {some_names(unknown)}")
    found.test = sorted(
        Labelled(file, (number[names[stem]],) if (stem := Path(file.name).stem) in names else ())
        for file in (each.file for each in found.test)
    )
    return found


def _validation(data: DataSet) -> dict[str, str]:
    """Names of the classes of ImageNet's validation images by their names, of Kaggle's list or the development kit."""
    if text := data.text("LOC_val_solution.csv"):
        rows = (line.partition(",") for line in text.splitlines()[1:])
        return {name: boxes.split()[0] for name, _, boxes in rows if boxes.strip()}
    packed = data.file(f"{DEVKIT}.tar.gz")
    contents = [file.read_bytes() if (file := data.file(name)) else b"" for name in (TRUTH, META)]
    if not all(contents) and packed is not None:
        with (
            reading(packed, "ImageNet's development kit"),
            packed.open("rb") as stream,
            tarfile.open(fileobj=stream) as archive,
        ):
            members = [archive.extractfile(name) for name in (TRUTH, META)]
            contents = [member.read() if member else b"" for member in members]
    if not all(contents):
        raise DataError(
            f"'{data.root}' has validation images without class folders; add LOC_val_solution.csv or {DEVKIT}.tar.gz"
        )
    with reading(data.root / META, "ImageNet's list of classes"):
        synsets = loadmat(io.BytesIO(contents[1]), squeeze_me=True)["synsets"]
        leaves = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets if each["num_children"] == 0}
        labels = [int(line) for line in contents[0].split()]
        return {f"ILSVRC2012_val_{i:08d}": leaves[label] for i, label in enumerate(labels, 1)}


def inaturalist(data: DataSet) -> ImageSet:
    """iNaturalist 2021: class folders, by their own names or torchvision's."""
    train = ("train", "2021_train", "train_mini", "2021_train_mini")
    found = class_folders(data, train, ("val", "2021_valid"))
    if (folder := Path(found.train[0].file.folder).name).endswith("mini"):
        log.warning("inaturalist: %d images to train on, of %s; there is no train", len(found.train), folder)
    return found


def sun397(data: DataSet) -> ImageSet:
    """SUN397's first partition: Training_01.txt and Testing_01.txt, with paths such as /a/abbey/sun_x.jpg."""
    lists = [data.text(f"{part}_01.txt", f"Partitions/{part}_01.txt") for part in ("Training", "Testing")]
    if not all(lists):
        raise DataError(f"'{data.root}' has no Training_01.txt and Testing_01.txt, or Partitions/ with them")
    paths = [[line.strip().lstrip("/") for line in (text or "").splitlines() if line.strip()] for text in lists]
    classes = sorted({path.rpartition("/")[0] for path in paths[0]})
    number, find = {name: i for i, name in enumerate(classes)}, data.lookup("SUN397", "")
    if unknown := sorted({path.rpartition("/")[0] for path in paths[1]} - {*number}):
        raise DataError(f"'{data.root}': Testing_01.txt has classes that are not trained on: {some_names(unknown)}")
    train, test = ([Labelled(find(path), (number[path.rpartition("/")[0]],)) for path in some] for some in paths)
    return ImageSet("", classes, train, test, hint=data.compressed("SUN397"))


PLACES_OLD = "images256", "data/vision/torralba/deeplearning/images256"
PLACES_TRAIN = (
    *(f"data_{size}{kind}" for kind in ("_standard", "", "_challenge") for size in ("256", "large")),
    *(f"train_{size}_places365{kind}/data_{size}" for kind in ("standard", "challenge") for size in ("256", "large")),
    *PLACES_OLD,
)  # the second ones in archives as distributed
PLACES_VAL = ("val_256", "val_large", *PLACES_OLD)
PLACES_LISTS = {  # of training and validation, by the number of classes
    365: (("places365_train_standard.txt", "places365_train_challenge.txt"), ("places365_val.txt",)),
    205: (("train_places205.csv",), ("val_places205.csv",)),
}
PLACES_LIST_FOLDERS = "", "trainvalsplit_places205/", "filelist_places365-standard/"


def places(data: DataSet) -> ImageSet:
    """Places365 or Places205: class folders in train and val, or the lists as distributed."""
    listed = {
        classes: [data.text(*(f"{folder}{name}" for folder in PLACES_LIST_FOLDERS for name in names))
                  for names in lists]
        for classes, lists in PLACES_LISTS.items()
    }  # fmt: skip
    classes, texts = next(((n, texts) for n, texts in listed.items() if all(texts)), (0, []))
    if not classes:
        return class_folders(data, ("train",), ("val",))
    train, test = (
        _listed(data, text or "", folders) for text, folders in zip(texts, (PLACES_TRAIN, PLACES_VAL), strict=True)
    )
    if not train:
        raise DataError(f"'{data.root}' has a list of training images that is empty")
    check_labels(train, classes, f"'{data.root}', list of training images")
    names = {label: each.file.name.rpartition("/")[0] for each in train for label in each.labels}
    found = ImageSet("", [names.get(i, str(i)) for i in range(max(names) + 1)], train, test)
    found.hint = data.compressed(*PLACES_TRAIN, *PLACES_VAL)
    check_labels(found.test, len(found.classes), f"'{data.root}', {PLACES_LISTS[classes][1][0]}")
    found.empty = [str(i) for i in range(len(found.classes)) if i not in names]
    return found


def _listed(data: DataSet, text: str, folders: Sequence[str]) -> list[Labelled]:
    """Images of a list with lines of a path and a label."""
    find, found = data.lookup(*folders), []
    for i, line in enumerate(text.splitlines(), 1):
        path, _, label = line.strip().rpartition(" ")
        if line.strip() and not (path and re.fullmatch(r"\d+", label)):
            raise DataError(f"'{data.root}': line {i} of a list is '{line}', but must be a path and a label")
        if path:
            found.append(Labelled(find(path.lstrip("/")), (int(label),)))
    return found


def check_labels(images: Iterable[Labelled], classes: int, where: str) -> None:
    """Raise a DataError that names an image whose label is out of range."""
    for file, labels in images:
        if wrong := [label for label in labels if not 0 <= label < classes]:
            raise DataError(f"{where}: the label of '{file.name}' is {wrong[0]}, but must be 0 to {classes - 1}")


def relabel(images: ImageSet, file: Path) -> None:
    """Replace the labels of the test images by those of a JSON file.

    A list has the labels of the images in the order of their names (ImageNet ReaL); a dictionary has them by path or
    name. Labels are indices of classes or their names, or lists of them; images without any are not scored. DataError:
    the file cannot be read, has another number of images, or an unknown label.
    """
    with reading(file, "labels of images"):
        content: Any = read_json(file)
        images.test = sorted(images.test, key=lambda each: each.file.name.rpartition("/")[2])
        if isinstance(content, list):
            if len(content) != len(images.test):
                raise ValueError(f"it has {len(content)} labels, but there are {len(images.test)} test images")
            every = content
        elif not isinstance(content, dict):
            raise ValueError("it holds neither a list nor a dictionary of labels")
        else:
            every = [content.get(each.file.name, content.get(each.file.name.rpartition("/")[2], []))
                     for each in images.test]  # fmt: skip
        number = {name: i for i, name in enumerate(images.classes)}
        listed = [each if isinstance(each, list) else [each] for each in every]
        every = [x for labels in listed for x in labels]
        unknown = [x for x in every if type(x) not in (int, str) or (isinstance(x, str) and x not in number)]
        if unknown:
            raise ValueError(f"there is no class {json.dumps(unknown[0])}")
        if not every:
            raise ValueError("it has no label of a test image")
        labels = [tuple(x if isinstance(x, int) else number[x] for x in each) for each in listed]
    images.test = [Labelled(each.file, own) for each, own in zip(images.test, labels, strict=True)]
    check_labels(images.test, len(images.classes), f"'{file}'")


LAYOUTS: dict[str, Callable[[DataSet], ImageSet]] = {
    "folder": lambda data: class_folders(data, ("train",), ("val", "test")),
    "imagenet": imagenet,
    "inaturalist": inaturalist,
    "sun397": sun397,
    "places": places,
}
