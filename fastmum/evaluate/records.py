"""Results of evaluations in a folder: JSON files and pictures."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastmum.data.errors import DataError, reading
from fastmum.errors import writing
from fastmum.evaluate.features import NORMS
from fastmum.files import read_json, write_atomic

MATCHERS = {  # evaluations and their names in tables
    "matching": "linear probe", "discriminant": "closed-form probe", "cosine": "cosine", "attention": "attention",
    "views": "masked loss", "recognition": "recognition", "segmentation": "segmentation",
    "reconstruction": "reconstruction", "depth": "depth", "pose": "relative pose",
    "roma": "dense matching",
}  # fmt: skip
MATCHING = ("matching", "discriminant", "cosine", "attention")  # those with a protocol, by default "patches"
KEYS = ("task", "set", "weights")
LARGEST = 1e300  # of numbers in files
LONGEST_NAME = 200  # bytes; file systems allow 255, and a suffix follows

# Shapes of the values that tables and pages read; `_fits` says what they mean.
OF_VIEWS = "same", "other", "change_same", "change_other"  # one value for each number of views
ANY, NUMBER, OPTIONAL = "any key", "a finite number", "a finite number or null"
_SCORES = {ANY: OPTIONAL}
SHAPES: dict[str, Any] = {
    "task": str, "set": str, "weights": str, "protocol": str, "scores": _SCORES, "settings": {},  # these are required
    "source": str, "frames": OPTIONAL, "encoder": {}, "pairs": NUMBER, "set_pairs": NUMBER, "no_motion": _SCORES,
    "per_pair_epe": _SCORES,
    "probes": [{"learning_rate": NUMBER, "evaluations": [{"step": NUMBER, "epe": OPTIONAL, "train_loss": OPTIONAL}]}],
    "blocks": {ANY: _SCORES}, "by_head": {ANY: _SCORES}, **{norm: {"scores": _SCORES} for norm in NORMS},
    "views": [NUMBER], "same": [NUMBER], "other": [NUMBER], "per_sequence": {},
    "change_same": [(NUMBER, OPTIONAL)], "change_other": [(NUMBER, OPTIONAL)],
}  # fmt: skip


class Record(NamedTuple):
    """A result in the folder."""

    file: Path  # JSON
    content: dict[str, Any]  # "task", "set", "weights", "scores", ...
    pictures: list[Path]


class Scored(NamedTuple):
    """Results on a set."""

    numbers: dict[str, Any]  # the content of a `Record`: "scores", "settings", those of each sequence or pair, ...
    pictures: list[Image.Image]


def make_folder(folder: Path, flag: str = "--out") -> None:
    """Create a folder and check that it is writable; raises `DataError`, which names the flag."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / ".writable", "")
        (folder / ".writable").unlink(missing_ok=True)  # another process may check the same folder
    except OSError as error:
        raise DataError(f"{flag} '{folder}' cannot be written to ({error.strerror}); name another folder") from None


def check_free(folder: Path, content: dict[str, Any]) -> None:
    """Check that a result would not replace one of another set or of other weights; else raise a `DataError`.

    Sets or weights whose names differ only in punctuation share a file, as do weights files of one name. "source", the
    path of the weights, is compared if both results have it.
    """
    file = folder / f"{_stem(content)}.json"
    old = _content(file) if file.exists() else content
    if (old["set"], old["weights"]) != (content["set"], content["weights"]):
        new, other = (f"'{each['weights']}' on '{each['set']}'" for each in (content, old))
    elif len({os.path.realpath(os.path.expanduser(e["source"])) for e in (content, old) if "source" in e}) == 2:
        new, other = (f"'{each['source']}'" for each in (content, old))
    else:
        return
    raise DataError(f"results of {new} would replace those of {other} in '{file}'; pass another --name or --out")


def save(folder: Path, content: dict[str, Any], pictures: Sequence[Image.Image]) -> Record:
    """Write a result; an earlier one of the same evaluation, set and weights is replaced. Raises `DataError`."""
    check_free(folder, content)
    stem = _stem(content)
    try:
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise DataError(f"the results of '{content['weights']}' on '{content['set']}' are no JSON ({error})") from None
    files = [folder / f"{stem}-{i}.jpg" for i in range(len(pictures))]
    with writing(folder, DataError):
        for old in _pictures(folder, stem):
            old.unlink()
        for picture, path in zip(pictures, files, strict=True):
            picture.save(path, quality=90, subsampling=0)
        write_atomic(folder / f"{stem}.json", text)
    return Record(folder / f"{stem}.json", content, files)


def read(folder: Path) -> list[Record]:
    """All results in the folder, sorted by task, set and weights; raises `DataError` for any other JSON file.

    Hidden files are skipped: operating systems and interrupted writers leave them.
    """
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix == ".json" and file.name[0] != ".")
    except OSError as error:
        raise DataError(f"the results in '{folder}' cannot be read ({error.strerror})") from None
    records = [Record(file, _content(file), _pictures(folder, file.stem)) for file in files]
    return sorted(records, key=lambda r: ([*MATCHERS].index(r.content["task"]), r.content["set"], r.content["weights"]))


def _content(file: Path) -> dict[str, Any]:
    with reading(file, "a result of fastmum.evaluate", "move it elsewhere, or evaluate again"):
        content = printable(read_json(file))
        if not isinstance(content, dict) or content.get("task") not in [*MATCHERS]:
            raise ValueError("it has no 'task' of fastmum.evaluate")
        for key in (*KEYS, "scores", "settings", *(("views", *OF_VIEWS[:2]) if content["task"] == "views" else ())):
            if key not in content:
                raise ValueError(f"it lacks '{key}'")
        for key, shape in SHAPES.items():
            if key in content and not _fits(content[key], shape):
                raise ValueError(f"'{key}' has no value of its kind")
        if any(len(content[key]) != len(content.get("views", ())) for key in OF_VIEWS if key in content):
            raise ValueError("'views' and the losses are not of one length")
    return content


def printable(content: Any) -> Any:
    """A JSON value with question marks for the bytes of names that are not UTF-8."""
    return json.loads(json.dumps(content, ensure_ascii=False).encode(errors="replace"))


def _fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape: a type, `NUMBER`, `OPTIONAL`, [shape of one or more], or (shape of each item).

    A dictionary of shapes names the keys that are needed, or with `ANY` the shape of all values.
    """
    if shape in (NUMBER, OPTIONAL):
        return abs(value) <= LARGEST if isinstance(value, int | float) else value is None and shape == OPTIONAL
    if isinstance(shape, list):
        return isinstance(value, list) and value != [] and all(_fits(each, shape[0]) for each in value)
    if isinstance(shape, tuple):
        return isinstance(value, list) and len(value) == len(shape) and all(map(_fits, value, shape))
    if isinstance(shape, dict):
        named = dict.fromkeys(value, shape[ANY]) if ANY in shape and isinstance(value, dict) else shape
        return isinstance(value, dict) and all(key in value and _fits(value[key], named[key]) for key in named)
    return isinstance(value, shape)


def _pictures(folder: Path, stem: str) -> list[Path]:
    numbered = ((re.fullmatch(re.escape(stem) + r"-(\d+)\.jpg", file.name), file) for file in folder.glob("*.jpg"))
    return [file for _, file in sorted((int(found[1]), file) for found, file in numbered if found)]


def _stem(content: dict[str, Any]) -> str:
    """Common part of the names of a result's files."""
    protocol = content.get("protocol", "patches")
    return file_stem(*(content[key] for key in KEYS), *([] if protocol == "patches" else [protocol]))


def file_stem(*names: str) -> str:
    """A part of a file name made of names, at most `LONGEST_NAME` bytes."""
    stem = "-".join(re.sub(r"[^\w.]+", "_", name).strip("_") or "_" for name in names)
    return stem.encode()[:LONGEST_NAME].decode(errors="ignore")
