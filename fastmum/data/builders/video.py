"""Videos: some of each one's frames are written as JPEG beside the manifest, and chunks of them are its sequences."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import natsort

from fastmum.data.builders.base import CHUNK_OPTIONS, CHUNK_RULE, Builder, Option, Options, chunks, images_in
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord
from fastmum.data.rules.chunks import CHUNK

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"})
SETTINGS = "settings.json"  # of a folder of frames: what they were made from and how
FPS = 5.0  # a chunk of 100 frames is then 20 s of video


class UnreadableVideoError(DataError):
    """A video that has no pictures or cannot be decoded."""


def frame_folder(root: Path, options: Options) -> Path:
    """Where the frames are written: for `all.arrow` the folder `all_frames` beside it."""
    return options.out.with_name(f"{options.out.stem}_frames")


def begin(root: Path, options: Options) -> None:
    """Look for PyAV and for options that contradict each other."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise DataError("videos are read with PyAV, which is not installed: pip install 'fastmum[video]'") from None
    if options.every is not None and options.fps is not None:
        raise DataError("--every and --fps are both given; give one of them")


def parts(root: Path, options: Options) -> list[str]:
    """Videos at any depth, in natural order."""
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(folder, name).relative_to(root).as_posix()
            for name in files
            if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")
        ]
    return natsort.natsorted(found)


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The video's frames in chunks; those that an earlier build has written are not written again."""
    folder = frame_folder(root, options) / part
    wanted = _settings(root / part, options)
    if _read_settings(folder) != wanted:
        try:
            _extract(root / part, folder, wanted)
        except UnreadableVideoError as error:
            if options.broken == "stop":
                raise DataError(f"{error} (--broken skip leaves such videos out)") from error
            log.warning("left out: %s", error)
            return
    yield from chunks(SequenceRecord(part, [f"{part}/{name}" for name in images_in(folder)]), options, released=CHUNK)


def _settings(video: Path, options: Options) -> dict[str, Any]:
    """Everything that the frames depend on."""
    about = video.stat()
    rate = {"every": options.every} if options.every is not None else {"fps": options.fps or FPS}
    sizes = {"short_side": options.short_side, "quality": options.quality}
    return rate | sizes | {"bytes": about.st_size, "modified_ns": about.st_mtime_ns}


def _read_settings(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _extract(video: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Write the frames into a folder that appears when it is whole."""
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for number, image in _frames(video, settings):
            image.save(part / f"{number:06d}.jpg", quality=settings["quality"])
        (part / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"the frames of '{video}' cannot be written to '{folder}' ({reason})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _frames(video: Path, settings: dict[str, Any]) -> Iterator[tuple[int, Image.Image]]:
    """The frames that the settings ask for, upright, with their numbers in the video."""
    import av

    try:
        with av.open(str(video)) as container:
            if not container.streams.video:
                raise UnreadableVideoError(f"'{video}' has no pictures; remove it")
            container.streams.video[0].thread_type = "AUTO"
            chosen, begin = 0, None
            for number, frame in enumerate(container.decode(video=0)):
                if frame.time is None and "fps" in settings:
                    raise DataError(f"'{video}' has no time stamps; give --every instead of --fps")
                begin = frame.time if begin is None else begin
                if "every" in settings:
                    takes = number % settings["every"] == 0
                else:  # the first frame at or after each tick; the tolerance is for rounded time stamps
                    takes = (frame.time - begin) * settings["fps"] >= chosen - 1e-3
                if takes:
                    chosen += 1
                    yield number, _upright(frame, settings["short_side"])
    except av.error.FFmpegError as error:
        raise UnreadableVideoError(f"'{video}' cannot be decoded ({error.strerror}); repair or remove it") from None


def _upright(frame: Any, short_side: int) -> Image.Image:
    image = frame.to_image()
    if frame.rotation:  # telephones write upright video lying, with a matrix that turns it
        image = image.rotate(frame.rotation, expand=True)
    if 0 < short_side < min(image.size):
        scale = short_side / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], reducing_gap=3.0)
    return image


BUILDER = Builder(
    layout="video files at any depth; their frames are written into FILE's folder, <stem of FILE>_frames",
    paper=f"frames in {CHUNK_RULE}",
    released=f"chunks of {CHUNK}, the last one takes the rest",
    parts=parts,
    sequences=sequences,
    begin=begin,
    root=frame_folder,
    options={
        "fps": Option(None, f"frames to take a second (default {FPS:g})", type=float, min=1e-3),
        "every": Option(None, "take every N-th frame instead", type=int, min=1),
        "short_side": Option(0, "shrink frames to this shorter side in pixels, 0: as they are", min=0),
        "quality": Option(92, "of the JPEG files", min=1, max=95),
        "broken": Option("stop", "what to do about a video that cannot be read", choices=("stop", "skip")),
        **CHUNK_OPTIONS,
    },
)
