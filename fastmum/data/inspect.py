"""Look into a manifest: `python -m fastmum.data.inspect FILE [--check] [--sheet PATH | --no-sheet]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifest

BOUNDS = (1, 2, 4, 8, 16, 24, 50, 100, 200, 500, 1000)  # of the histogram's bins
BAR = 40  # characters of its longest bar
NAMED = 10  # missing files to name
THREADS = 16  # that list folders at a time: file systems over a network answer late, not slowly


class Missing(NamedTuple):
    """Files of a manifest that are not on disk.

    Args:
        images: different images that were looked for.
        files: paths of those that are not there.
    """

    images: int
    files: list[Path]


def summary(manifest: Manifest) -> Iterator[str]:
    """The lines that are printed."""
    about = manifest.metadata
    size = manifest.path.stat().st_size / 1e6
    yield f"{manifest.path}: {manifest.num_sequences} sequences, {manifest.num_frames} frames, {size:.1f} MB"
    yield f"root: {manifest.root}"
    known = {"root", "counts", "options"}
    yield ", ".join(f"{key}: {value}" for key, value in about.items() if key not in known)
    if about.get("options"):
        yield "options: " + ", ".join(f"{key} {value}" for key, value in about["options"].items())
    for what, count in (("pose", manifest.known["pose"]), ("intrinsics", manifest.known["intrinsics"])):
        yield f"{what} known: {count} frames ({count / manifest.num_frames:.1%})"
    yield ""
    lengths = np.diff(manifest.starts)
    width = max(8, *map(len, manifest.datasets))
    yield f"{'data set':<{width}} {'sequences':>10} {'frames':>10} {'shortest':>9} {'median':>7} {'longest':>8}"
    for i, name in enumerate(manifest.datasets):
        mine = lengths[manifest.dataset_of == i]
        figures = f"{len(mine):>10} {mine.sum():>10} {mine.min():>9} {np.median(mine):>7g} {mine.max():>8}"
        yield f"{name:<{width}} {figures}"
    yield ""
    yield from _histogram(lengths)


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    yield f"{'frames':>9} {'sequences':>10}"
    counts = np.bincount(np.searchsorted(BOUNDS, lengths, side="right") - 1, minlength=len(BOUNDS))
    used = np.flatnonzero(counts)
    for i in range(used[0], used[-1] + 1):
        below = BOUNDS[i + 1] - 1 if i + 1 < len(BOUNDS) else None
        label = str(BOUNDS[i]) if below == BOUNDS[i] else f"{BOUNDS[i]}-{below}" if below else f"{BOUNDS[i]} on"
        yield f"{label:>9} {counts[i]:>10} {'#' * -(-BAR * counts[i] // counts.max())}"


def find_missing(manifest: Manifest, progress: bool = False) -> Missing:
    """Look every image up in the listing of its folder; files that are there but broken are for the decoder to find."""
    total, files = 0, []
    with ThreadPoolExecutor(THREADS) as pool, tqdm(unit="image", desc="checking", disable=not progress) as bar:
        for folder, names, absent in pool.map(_absent, manifest.folders()):
            total += len(names)
            files += [folder / name for name in absent]
            bar.update(len(names))
    return Missing(total, files)


def _absent(folder_names: tuple[Path, list[str]]) -> tuple[Path, list[str], list[str]]:
    folder, names = folder_names
    try:
        there = set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        there = set()
    except OSError as error:
        raise DataError(f"the folder '{folder}' cannot be read ({error.strerror})") from None
    return folder, names, [name for name in names if name not in there]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastmum.data.inspect",
        description="What a manifest holds: sequences, frames, lengths, data sets, and how it was made.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the manifest")
    parser.add_argument("--check", action="store_true", help="look for missing files; exit code 1 if there are any")
    sheet = parser.add_mutually_exclusive_group()
    sheet.add_argument(
        "--sheet", type=Path, metavar="PATH",
        help="where to write the contact sheet of sampled sequences (default: <stem of FILE>_sheet.jpg beside FILE)",
    )  # fmt: skip
    sheet.add_argument("--no-sheet", action="store_true", help="write none")
    parser.add_argument("--sequences", type=int, default=12, metavar="N", help="on the sheet (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sheet's samples (default %(default)s)")
    return parser


def _write_sheet(manifest: Manifest, file: Path, sequences: int, seed: int) -> None:
    # Pillow is wanted for this alone.
    from fastmum.data.contact_sheet import contact_sheet

    try:
        contact_sheet(manifest, sequences, seed).save(file, quality=85)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"--sheet '{file}' cannot be written ({reason}); its name ends in .jpg or .png (--no-sheet writes none)"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        for name, least in (("sequences", 1), ("seed", 0)):
            if (value := getattr(args, name)) < least:
                raise DataError(f"--{name} is {value}, but must be at least {least}")
        manifest = Manifest.open(args.file)
        print("\n".join(summary(manifest)))
        if not args.no_sheet:
            sheet = args.sheet or args.file.with_name(f"{args.file.stem}_sheet.jpg")
            _write_sheet(manifest, sheet, args.sequences, args.seed)
            print(f"\ncontact sheet: {sheet}")
        if args.check:
            missing = find_missing(manifest, progress=True)
            print(f"\nmissing: {len(missing.files)} of {missing.images} images")
            for file in missing.files[:NAMED]:
                print(f"  {file}")
            if len(missing.files) > NAMED:
                print("  ...")
            return int(bool(missing.files))
        sys.stdout.flush()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads has seen enough, such as `head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it when it ends)
    return 0


if __name__ == "__main__":
    sys.exit(main())
