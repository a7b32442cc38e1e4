"""Renders the embedded scenes: `python -m fastmum.data.scenes --help`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from fastmum.scenes.cache import cached_folder, render_missing, scene_dirs


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m fastmum.scenes",
        description="Render the embedded scenes: rooms and courtyards with pose, intrinsics and depth for every view. "
        "Scenes that are already there are kept.",
    )
    p.add_argument("--count", type=int, default=20, metavar="N", help="scenes (default %(default)s)")
    p.add_argument("--views", type=int, default=24, metavar="V", help="views a scene (default %(default)s)")
    p.add_argument("--size", type=int, default=256, metavar="P", help="pixels a side (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="chooses rooms and paths (default %(default)s)")
    p.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="put scene_0000, ... into DIR (default: a folder in $FASTMUM_CACHE or the user's cache)",
    )
    p.add_argument(
        "--workers", type=int, metavar="W", help="processes; 0 renders in this one (default: one a core, at most 8)"
    )
    p.add_argument(
        "--contact-sheet", type=Path, metavar="FILE", help="also write a picture: a row a scene, 6 views each"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    start = time.perf_counter()
    try:
        root = args.out or cached_folder(args.views, args.size, args.seed)
        rendered = render_missing(root, args.count, args.views, args.size, args.seed, args.workers)
        seconds = time.perf_counter() - start
        if args.contact_sheet is not None:
            _write_sheet(args.contact_sheet, scene_dirs(root, args.count))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished scenes are kept", file=sys.stderr)
        return 130
    speed = f"{rendered} rendered in {seconds:.1f} s, {rendered * args.views / seconds:.1f} views/s"
    print(f"{args.count} scenes of {args.views} views in {root} ({speed if rendered else 'all were there already'})")
    return 0


def _write_sheet(file: Path, folders: list[Path]) -> None:
    from fastmum.scenes.sheet import contact_sheet

    try:
        contact_sheet(folders).save(file, quality=82)
    except (OSError, ValueError) as error:
        raise ValueError(f"--contact-sheet {file}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
