"""The sequences of the authors' released annotation files, which name the frames of each (their release `annotations`).

The files are gzip'd JSON: `{sequence: [frame, ...]}`, or `{scene: [[frame, ...], ...]}` for MegaDepth, whose sequences
their loader calls `<scene>_<i>`. A frame has a `filepath`; MegaScenes adds `qvec` (w x y z) and `tvec`, CO3D of VGGT's
preprocessing `extri` (3 x 4) and `intri` (3 x 3), all camera_from_world with OpenCV axes.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastmum.data.builders import base
from fastmum.data.builders.base import Builder, Option, Options
from fastmum.data.builders.cameras import from_K, reading
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord
from fastmum.files import expand_user

SHORTEST = 24  # frames; the authors' loader drops shorter sequences
SPLITS = ("train", "val", "test")
# Folders of a data set as it is distributed that the released paths leave out.
PREFIXES = ("", "dataset_aligned/", "3dod/Training/", "train/")
PROBED = 5  # frames by which the prefix is found
CHUNK = 1 << 20  # characters that are read at a time
SPACE = " \t\r\n"


def parts(root: Path, options: Options) -> list[str]:
    """Annotation files of the split, below `--annotations`, or the file that it names."""
    folder = annotations(root, options)
    if folder.is_file():
        return ["."]
    found = sorted(f"{place}/{name}" for place, names in base.walk(folder) for name in names if name.endswith(".jgz"))
    return [name.removeprefix("./") for name in found if _split(name) in (None, options.split)]


def annotations(root: Path, options: Options) -> Path:
    """`--annotations`, else the folder `annotations` in the root."""
    return expand_user(options.annotations) if options.annotations else root / "annotations"


def _split(name: str) -> str | None:
    """The split that a file name ends with, None if it names none."""
    last = name.rpartition("/")[2].removesuffix(".jgz").rpartition("_")[2]
    return last if last in SPLITS else None


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The sequences of a file, one in memory at a time."""
    file = annotations(root, options) / part if part != "." else annotations(root, options)
    prefix, category = None, file.name.removesuffix(".jgz").rpartition("_")[0]  # of CO3D, `<category>_train.jgz`
    category = f"{category}/" if category and _split(file.name) else ""
    with reading(file, "released annotations"), file.open("rb") as packed, gzip.open(packed, "rt") as stream:
        for scene, number, frames in read_sequences(stream):
            if len(frames) < options.min_frames:
                continue
            paths = [str(frame["filepath"]) for frame in frames]
            prefix = _prefix(root, paths, file) if prefix is None else prefix
            name = f"{category}{scene}" if number is None else f"{scene}_{number}"
            record = SequenceRecord(name, [prefix + path for path in paths], scene=f"{category}{scene}")
            yield _with_cameras(record, frames) if options.poses else record


def _prefix(root: Path, paths: list[str], file: Path) -> str:
    """The folder below the root that paths are relative to, by the first frames."""
    for prefix in PREFIXES:
        if any((root / (prefix + path)).is_file() for path in paths[:PROBED]):
            return prefix
    raise DataError(f"'{file}' names '{paths[0]}', which is not below '{root}'; give the data set's folder as --root")


def _with_cameras(record: SequenceRecord, frames: list[dict[str, Any]]) -> SequenceRecord:
    first = frames[0]
    if "qvec" in first and "tvec" in first:
        from scipy.spatial.transform import Rotation  # slow to import

        quaternions = np.array([frame["qvec"] for frame in frames], np.float64)
        poses = np.tile(np.eye(4), (len(frames), 1, 1))
        poses[:, :3, :3] = Rotation.from_quat(quaternions[:, [1, 2, 3, 0]]).as_matrix()
        poses[:, :3, 3] = [frame["tvec"] for frame in frames]
        return record._replace(poses=poses.astype(np.float32))
    if "extri" in first and "intri" in first:
        poses = np.tile(np.eye(4, dtype=np.float32), (len(frames), 1, 1))
        poses[:, :3] = [np.reshape(frame["extri"], (-1, 4))[:3] for frame in frames]
        K = np.stack([from_K(np.reshape(frame["intri"], (3, 3))) for frame in frames])
        return record._replace(poses=poses, intrinsics=K)
    return record


def read_sequences(stream: IO[str]) -> Iterator[tuple[str, int | None, list[dict[str, Any]]]]:
    """Scene, number in the scene (None: the only one) and frames of every sequence, without reading the whole file.

    ValueError: it is not JSON of the released form.
    """
    reader = _Reader(stream)
    reader.take("{")
    while reader.peek() != "}":
        scene = reader.value()
        reader.take(":")
        reader.take("[")
        if reader.peek() == "[":
            number = 0
            while reader.peek() != "]":
                yield scene, number, reader.value()
                number += 1
                reader.skip(",")
        else:
            frames = []
            while reader.peek() != "]":
                frames.append(reader.value())
                reader.skip(",")
            yield scene, None, frames
        reader.take("]")
        reader.skip(",")


class _Reader:
    """Reads JSON value by value."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._text, self._at = stream, "", 0
        self._decoder = json.JSONDecoder()

    def _more(self) -> bool:
        chunk = self._stream.read(max(CHUNK, len(self._text) - self._at))  # doubles, for values of any size
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no space."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                raise ValueError("it is cut off")

    def take(self, character: str) -> None:
        """Read a character."""
        if self.peek() != character:
            raise ValueError(f"'{character}' was expected, not '{self.peek()}'")
        self._at += 1

    def skip(self, character: str) -> None:
        """Read a character if it is the next."""
        if self.peek() == character:
            self._at += 1

    def value(self) -> Any:
        """Read a value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text):  # else a number may go on
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                failed = error
            else:
                failed = json.JSONDecodeError("it is cut off", "", 0)
            if not self._more():
                raise ValueError(failed.msg)


BUILDERS = {
    "released": Builder(
        layout="the data set's own folder of images, and annotations/**/*.jgz, the authors' released files",
        paper="the very sequences of the released files, at least 24 frames",
        parts=parts,
        sequences=sequences,
        options={
            "annotations": Option("", "released file, or a folder of them (default: annotations in RAW)"),
            "split": Option("train", "files of this split, and those of none", choices=SPLITS),
            "min_frames": base.MIN_FRAMES["min_frames"]._replace(default=SHORTEST),
            **base.POSES,
        },
    )
}
