"""From a scene with its frames in order to sequences: whole, or in chunks."""

from __future__ import annotations

from collections.abc import Iterator

from fastmum.data.builders.base import Option, Options
from fastmum.data.manifest import SequenceRecord
from fastmum.data.rules.chunks import CHUNK, cut_into_chunks

MIN_FRAMES = Option(2, "shorter sequences are left out", least=1)
POSES = Option(True, "read poses and intrinsics where they are there")
CHUNK_OPTIONS = {
    "chunk": Option(None, "frames of a chunk, 0: the whole scene (default: the rule's)", kind=int, least=0),
    "min_frames": MIN_FRAMES,
}
CHUNK_RULE = f"natural order, chunks of {CHUNK}, the last one shorter"


def whole(scene: SequenceRecord, options: Options) -> Iterator[SequenceRecord]:
    """The scene if it has at least `options.min_frames` frames."""
    if len(scene.frames) >= options.min_frames:
        yield scene


def chunks(scene: SequenceRecord, options: Options, released: int | None) -> Iterator[SequenceRecord]:
    """The scene in chunks, `<name>/000`, `<name>/001`, ...

    Args:
        scene: with all its frames.
        options: of the builder, with `CHUNK_OPTIONS`.
        released: frames of a chunk in the released script, None where it takes the whole scene.
    """
    size = options.chunk if options.chunk is not None else CHUNK if options.rule == "paper" else released
    if not size:
        yield from whole(scene, options)
        return
    for i, part in enumerate(cut_into_chunks(len(scene.frames), size, last_takes_rest=options.rule == "released")):
        rows = slice(part.start, part.stop)
        yield from whole(
            SequenceRecord(
                f"{scene.name}/{i:03d}",
                scene.frames[rows],
                None if scene.poses is None else scene.poses[rows],
                None if scene.intrinsics is None else scene.intrinsics[rows],
            ),
            options,
        )
