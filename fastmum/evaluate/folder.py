"""A folder of results: a JSON file and pictures for each evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastmum.data.errors import DataError
from fastmum.files import write_atomic

TASKS = ("matching", "cosine", "attention", "views")
KEYS = ("task", "set", "weights")


class Record(NamedTuple):
    """A result in the folder: its JSON file, the content ("task", "set", "weights", "scores", ...), its pictures."""

    file: Path
    content: dict[str, Any]
    pictures: list[Path]


def make_folder(folder: Path) -> None:
    """Create a folder and check that it is writable; raises `DataError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise DataError(f"--out '{folder}' cannot be written to ({error.strerror}); name another folder") from None


def check_free(folder: Path, content: dict[str, Any]) -> None:
    """Check that a result would not replace one of another set or of other weights.

    Sets or weights whose names differ only in punctuation share a file, as do weights files of one name.

    Args:
        content: "task", "set" and "weights"; "source", the path of the weights, is compared if both results have it.

    Raises:
        DataError: it would.
    """
    file = folder / f"{_stem(content)}.json"
    old = _content(file) if file.exists() else content
    if (old["set"], old["weights"]) != (content["set"], content["weights"]):
        new, other = (f"'{each['weights']}' on '{each['set']}'" for each in (content, old))
    elif "source" in old and "source" in content and _resolved(old) != _resolved(content):
        new, other = (f"'{each['source']}'" for each in (content, old))
    else:
        return
    raise DataError(f"results of {new} would replace those of {other} in '{file}'; pass another --name or --out")


def save(folder: Path, content: dict[str, Any], pictures: Sequence[Image.Image]) -> Record:
    """Write a result; an earlier one of the same evaluation, set and weights is replaced.

    Raises:
        DataError: it cannot be written, or see `check_free`.
    """
    check_free(folder, content)
    stem = _stem(content)
    try:
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise DataError(f"the results of '{content['weights']}' on '{content['set']}' are no JSON ({error})") from None
    files = [folder / f"{stem}-{i}.jpg" for i in range(len(pictures))]
    try:
        for old in _pictures(folder, stem):
            old.unlink()
        for picture, path in zip(pictures, files, strict=True):
            picture.save(path, quality=90, subsampling=0)
        write_atomic(folder / f"{stem}.json", text)
    except OSError as error:
        raise DataError(f"the results cannot be written to '{folder}' ({error.strerror or error})") from None
    return Record(folder / f"{stem}.json", content, files)


def read(folder: Path) -> list[Record]:
    """All results in the folder, sorted by task, set and weights; raises `DataError` for any other JSON file."""
    records = [Record(file, _content(file), _pictures(folder, file.stem)) for file in folder.glob("*.json")]
    return sorted(records, key=lambda r: (TASKS.index(r.content["task"]), r.content["set"], r.content["weights"]))


def _content(file: Path) -> dict[str, Any]:
    """A result with everything that the table and the page need; raises `DataError`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        valid = all(isinstance(content[key], str) for key in KEYS) and content["task"] in TASKS
        if not valid or not all(isinstance(content[key], dict) for key in ("scores", "settings")):
            raise ValueError("it is of another kind")
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"'{file}' is no result of fastmum.evaluate ({reason}); move it elsewhere") from None
    return content


def _resolved(content: dict[str, Any]) -> Path:
    return Path(content["source"]).expanduser().resolve()


def _pictures(folder: Path, stem: str) -> list[Path]:
    numbered = {
        int(found[1]): file
        for file in folder.glob("*.jpg")
        if (found := re.fullmatch(re.escape(stem) + r"-(\d+)\.jpg", file.name))
    }
    return [file for _, file in sorted(numbered.items())]


def _stem(content: dict[str, Any]) -> str:
    """Common part of the names of a result's files."""
    return "-".join(re.sub(r"[^\w.]+", "_", content[key]).strip("_") or "_" for key in KEYS)
