"""Videos: frames are written as JPEG next to the manifest, and chunks of them are sequences."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import natsort
from PIL import Image

from fastmum.data.builders.base import CHUNK_RULE, CHUNKED, Builder, Option, Options, chunks, images_in, walk
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord
from fastmum.data.rules import CHUNK
from fastmum.errors import writing
from fastmum.files import regular

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"})
SETTINGS = "settings.json"  # in a folder of frames: everything that they depend on
FPS = 5.0  # a chunk of 100 frames is then 20 s of video


class UnreadableVideoError(DataError):
    """A video that has no pictures or cannot be decoded."""


def frame_folder(root: Path, options: Options) -> Path:
    """Folder of the frames: `all_frames` next to `all.arrow`."""
    return options.out.with_name(f"{options.out.stem}_frames")


def begin(root: Path, options: Options) -> None:
    """Check for PyAV and for options that contradict each other."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise DataError("videos are read with PyAV, which is not installed: pip install 'fastmum[video]'") from None
    if options.every is not None and options.fps is not None:
        raise DataError("--every and --fps are both given; give one of them")


def parts(root: Path, options: Options) -> list[str]:
    """Videos at any depth, in natural order."""
    files = (Path(folder, name) for folder, names in walk(root) for name in names if not name.startswith("."))
    return natsort.natsorted(file.as_posix() for file in files if file.suffix.lower() in VIDEO_SUFFIXES)


def sequences(root: Path, part: str, options: Options) -> Iterator[SequenceRecord]:
    """The video's frames in chunks; frames of an earlier build are kept."""
    folder, video = frame_folder(root, options) / part, root / part
    file = video.stat()
    rate = {"every": options.every} if options.every is not None else {"fps": options.fps or FPS}
    sizes = {"short_side": options.short_side, "quality": options.quality}
    settings = rate | sizes | {"bytes": file.st_size, "modified_ns": file.st_mtime_ns}
    earlier = None
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if earlier != settings:
        try:
            _extract(video, folder, settings)
        except UnreadableVideoError as error:
            if options.broken == "stop":
                raise DataError(f"{error} (--broken skip skips such videos)") from error
            log.warning("skipped: %s", error)
            return
    yield from chunks(SequenceRecord(part, [f"{part}/{name}" for name in images_in(folder)]), options, released=CHUNK)


def _extract(video: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Write the frames into a temporary folder that is renamed when complete."""
    partial = folder.with_name(f".{folder.name}.part")
    try:
        with writing(folder, DataError):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for number, image in _frames(video, settings):
                image.save(partial / f"{number:06d}.jpg", quality=settings["quality"])
            (partial / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _frames(video: Path, settings: dict[str, Any]) -> Iterator[tuple[int, Image.Image]]:
    """The chosen frames, upright, with their numbers in the video."""
    import av

    try:
        with av.open(str(regular(video))) as container:
            if not container.streams.video:
                raise UnreadableVideoError(f"'{video}' has no pictures; remove it")
            container.streams.video[0].thread_type = "AUTO"
            chosen, begin = 0, None
            for number, frame in enumerate(container.decode(video=0)):
                if frame.time is None and "fps" in settings:
                    raise DataError(f"'{video}' has no time stamps; give --every instead of --fps")
                begin = frame.time if begin is None else begin
                if "every" in settings:
                    take = number % settings["every"] == 0
                else:  # the first frame at or after each tick; the tolerance is for rounded time stamps
                    take = (frame.time - begin) * settings["fps"] >= chosen - 1e-3
                if take:
                    chosen += 1
                    yield number, _upright(frame, settings["short_side"])
    except (av.error.FFmpegError, OSError) as error:
        raise UnreadableVideoError(f"'{video}' cannot be decoded ({error.strerror}); repair or remove it") from None


def _upright(frame: Any, short_side: int) -> Image.Image:
    image = frame.to_image()
    if frame.rotation:  # phones store upright video rotated, with a rotation matrix
        image = image.rotate(frame.rotation, expand=True)
    if 0 < short_side < (shorter := min(image.size)):
        image = image.resize([round(side * (short_side / shorter)) for side in image.size], reducing_gap=3.0)
    return image


BUILDERS = {
    "video": Builder(
        layout="video files at any depth; their frames are written next to FILE, into <stem of FILE>_frames",
        paper=f"frames in {CHUNK_RULE}",
        released=f"chunks of {CHUNK}, the last one takes the rest",
        parts=parts,
        sequences=sequences,
        begin=begin,
        root=frame_folder,
        options={
            "fps": Option(None, f"frames per second to take (default {FPS:g})", type=float, min=1e-3),
            "every": Option(None, "take every N-th frame instead", type=int, min=1),
            "short_side": Option(0, "shrink frames to this shorter side in pixels, 0: keep their size", min=0),
            "quality": Option(92, "of the JPEG files", min=1, max=95),
            "broken": Option("stop", "at a video that cannot be read", choices=("stop", "skip")),
            **CHUNKED,
        },
    )
}
