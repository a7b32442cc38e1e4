"""Render the embedded scenes: `python -m fastmum.scenes --help`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fastmum.errors import program, run_command, writing
from fastmum.files import expand_user, read_json
from fastmum.scenes.cache import ScenesError, Settings, cached_folder, render_missing, scene_dirs


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("fastmum.scenes"),
        description="Render the embedded scenes: rooms and courtyards with pose, intrinsics and depth for every view. "
        "Scenes that exist are kept.",
    )
    add = parser.add_argument
    add("--count", type=int, default=20, metavar="N", help="number of scenes (default %(default)s)")
    add("--views", type=int, default=24, metavar="V", help="views per scene (default %(default)s)")
    add("--size", type=int, default=256, metavar="P", help="side of a view in pixels (default %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of rooms and paths (default %(default)s)")
    add("--out", type=expand_user, metavar="DIR", help="default: a folder in $FASTMUM_CACHE or the user's cache")
    add("--workers", type=int, metavar="W", help="processes; 0: this one (default: one per core, at most 8)")
    add(
        "--contact-sheet",
        type=expand_user,
        metavar="FILE",
        help="also write an image with a row of 6 views for each scene",
    )
    args = parser.parse_args(argv)
    return run_command(lambda: _run(args), interrupted="stopped; finished scenes are kept")


def _run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    settings = Settings(args.seed, args.views, args.size)
    root = args.out or cached_folder(settings)
    rendered = render_missing(root, args.count, settings, args.workers)
    seconds = time.perf_counter() - start
    if args.contact_sheet is not None:
        _write_sheet(args.contact_sheet, scene_dirs(root, args.count))
    speed = f"{rendered} rendered in {seconds:.1f} s, {rendered * args.views / seconds:.1f} views/s"
    print(f"{args.count} scenes of {args.views} views in {root} ({speed if rendered else 'all were there already'})")


def _write_sheet(file: Path, folders: list[Path], columns: int = 6, tile: int = 128) -> None:
    """Write an image with a row per scene: `columns` evenly spaced views of `tile` pixels, two pixels apart."""
    import numpy as np
    from PIL import Image

    pitch = tile + 2
    sheet = Image.new("RGB", (columns * pitch - 2, len(folders) * pitch - 2), "white")
    with writing(file, ScenesError, ValueError):
        for row, folder in enumerate(folders):
            frames = read_json(folder / "cameras.json")["frames"]
            for column, view in enumerate(np.linspace(0, len(frames) - 1, columns).round().astype(int)):
                with Image.open(folder / frames[view]["file"]) as image:
                    sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), (column * pitch, row * pitch))
        sheet.save(file, quality=82)


if __name__ == "__main__":
    sys.exit(main())
