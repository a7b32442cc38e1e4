"""Videos: frames are written as JPEG next to the manifest, and chunks of them are sequences."""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import natsort
from PIL import Image

from fastmum.data.builders.base import CHUNK_RULE, CHUNKED, Builder, Option, Options, chunks, images_in, walk
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord
from fastmum.data.rules import CHUNK
from fastmum.errors import writing
from fastmum.files import read_json, regular

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    ".mp4 .mov .m4v .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .3gp .ogv".split()  # noqa: SIM905
)
ASPECTS = 0.1, 10.0  # width over height of a pixel; a video that states others is damaged there
SETTINGS = "settings.json"  # in a folder of frames: everything that they depend on
WHOLE = 0.9  # of the frames that a file announces; an edit list may hide a few
STAMPS = 0.9e-3  # seconds by which the time between two frames may be off: Matroska rounds their stamps to milliseconds
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
    sizes = {"short_side": options.short_side, "quality": options.quality, "pixels": "square"}
    settings = rate | sizes | {"bytes": file.st_size, "modified_ns": file.st_mtime_ns}
    earlier = None
    with contextlib.suppress(OSError, ValueError):
        earlier = read_json(folder / SETTINGS)
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
    from av.stream import Disposition

    chosen, elapsed, before = 0, 0.0, None
    try:
        with av.open(str(regular(video))) as container:
            stream: Any = container.streams.best("video")
            if stream is None or Disposition.attached_pic in stream.disposition:  # the cover of a piece of music
                raise UnreadableVideoError(f"'{video}' has no moving pictures; remove it")
            if stream.frames == 1:  # a still of many bytes may count as the best
                stream = max(container.streams.video, key=lambda each: each.frames)
            stream.thread_type = "AUTO"
            frame: Any
            for number, frame in enumerate(container.decode(stream)):
                if "every" in settings:
                    tick = number // settings["every"]
                elif frame.time is None:
                    raise DataError(f"'{video}' has no time stamps; give --every instead of --fps")
                else:  # the first frame at or after each tick
                    if before is not None:
                        elapsed += max(frame.time - before, 0.0)  # stamps go back where recordings were joined
                    before = frame.time
                    tick = math.floor((elapsed + STAMPS) * settings["fps"])
                if tick >= chosen:
                    chosen = tick + 1  # a frame serves all ticks since the one before it
                    yield number, _upright(frame, stream.sample_aspect_ratio, settings["short_side"])
    except (av.error.FFmpegError, OSError) as error:
        raise UnreadableVideoError(f"'{video}' cannot be decoded ({error.strerror}); repair or remove it") from None
    if not chosen:
        raise UnreadableVideoError(f"'{video}' has no frame that can be decoded; repair or remove it")
    if number + 1 < WHOLE * stream.frames:
        log.warning("'%s' is cut off: it has %d of %d frames", video, number + 1, stream.frames)


def _upright(frame: Any, aspect: Fraction | None, short_side: int) -> Image.Image:
    """A frame as an image with square pixels; `aspect` is the width of the stored ones over their height."""
    image = frame.to_image()
    if aspect and aspect != 1 and ASPECTS[0] <= aspect <= ASPECTS[1]:
        width, height = image.size
        image = image.resize((round(width * max(aspect, 1)), round(height / min(aspect, 1))), Image.Resampling.BICUBIC)
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
        archives=False,
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
