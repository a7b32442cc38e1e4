"""A folder of results: a JSON file and pictures for each evaluation, one table and one page for all of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastmum.data.errors import DataError

TASKS = ("matching", "cosine", "attention", "views")
KEYS = ("task", "set", "weights")
NUMBERS = ("scores", "settings")
QUALITY = 90  # of JPEG


class Record(NamedTuple):
    """A result as it lies in the folder.

    Args:
        file: its JSON.
        content: "task", "set", "weights", "scores", "settings" and what else the evaluation gives.
        pictures: its pictures.
    """

    file: Path
    content: dict[str, Any]
    pictures: list[Path]


def make_folder(folder: Path) -> None:
    """Make the folder, before anything is computed.

    Raises:
        DataError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"--out '{folder}' cannot be written to ({error.strerror}); name another folder") from None


def check_free(folder: Path, task: str, set_: str, weights: str) -> None:
    """Look whether a result has a file of its own, as names that differ in punctuation alone have not.

    Raises:
        DataError: the file is there and of another set or of other weights.
    """
    file = folder / f"{_stem(task, set_, weights)}.json"
    if not file.exists():
        return
    there = _content(file)
    if (there["set"], there["weights"]) != (set_, weights):
        raise DataError(
            f"'{file}' holds results of '{there['weights']}' on '{there['set']}', and those of '{weights}' on '{set_}' "
            "would replace them; another --name or --out keeps both"
        )


def save(folder: Path, content: dict[str, Any], pictures: Sequence[Image.Image]) -> Record:
    """Write a result; one of the same evaluation, set and weights is replaced.

    Raises:
        DataError: it cannot be written, or would replace that of another set or of other weights.
    """
    check_free(folder, *(content[key] for key in KEYS))
    stem = _stem(*(content[key] for key in KEYS))
    try:
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise DataError(f"the results of '{content['weights']}' on '{content['set']}' are no JSON ({error})") from None
    try:
        for old in _pictures(folder, stem):
            old.unlink()
        files = [folder / f"{stem}-{i}.jpg" for i in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            picture.save(file, quality=QUALITY, subsampling=0)
        file = folder / f"{stem}.json"
        write(file, text)
    except OSError as error:
        raise DataError(f"the results cannot be written to '{folder}' ({error.strerror or error})") from None
    return Record(file, content, files)


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(f"partial_{file.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def read(folder: Path) -> list[Record]:
    """All results in the folder, by task, set and weights.

    Raises:
        DataError: a file that is none.
    """
    records = []
    for file in folder.glob("*.json"):
        records.append(Record(file, _content(file), _pictures(folder, file.stem)))
    return sorted(records, key=lambda r: (TASKS.index(r.content["task"]), r.content["set"], r.content["weights"]))


def _content(file: Path) -> dict[str, Any]:
    """A result, with all that the table and the page rely on.

    Raises:
        DataError: the file is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        whole = all(isinstance(content[key], str) for key in KEYS)
        if not whole or content["task"] not in TASKS or not all(isinstance(content[key], dict) for key in NUMBERS):
            raise ValueError("it is of another kind")
    except KeyError as error:
        raise DataError(f"'{file}' is no result of fastmum.evaluate (it lacks {error}); move it elsewhere") from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"'{file}' is no result of fastmum.evaluate ({error}); move it elsewhere") from None
    return content


def _pictures(folder: Path, stem: str) -> list[Path]:
    found = {file: match for file in folder.glob(f"{stem}-*.jpg") if (match := re.search(r"-(\d+)\.jpg$", file.name))}
    own = [file for file, match in found.items() if file.name == f"{stem}-{match[1]}.jpg"]
    return sorted(own, key=lambda file: int(found[file][1]))


def _stem(task: str, set_: str, weights: str) -> str:
    """Of the files of a result."""
    return "-".join(map(_slug, (task, set_, weights)))


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("_") or "_"
