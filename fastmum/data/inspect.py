"""Show what manifests contain: `python -m fastmum.data.inspect FILE ... [--check] [--sheet PATH | --no-sheet]`."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastmum.data.builders.base import names_in
from fastmum.data.check import THREADS, find_damaged
from fastmum.data.decode import PillowDecoder
from fastmum.data.decode.image import whole_frames
from fastmum.data.depth import DepthFormat, read_depth
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifest, Manifests
from fastmum.data.splits import MOST_LOOKED_UP, hold_out, image_overlap
from fastmum.data.spread import add_arguments, cluster, spread
from fastmum.data.store import is_url
from fastmum.errors import program, run_command
from fastmum.progress import progress_bar

BINS = (1, 2, 4, 8, 16, 24, 50, 100, 200, 500, 1000)  # lower bounds of the histogram's bins
BAR = 40  # characters of its longest bar
NAMED = 10  # missing files to name
FOLDERS = 64  # that a task on a cluster lists
FILES = {"path": "images", "depth": "depth maps", "mask": "masks", "side": "depth masks"}
# Contact sheet (after the supplement's Fig. 5).
COLUMNS = 12  # a sequence of the most views, 24, takes two lines
VIEWS = (2, 24)  # supplement, "Sampling"
GAP, LABEL = 2, 16  # pixels between tiles, height of a line of text
MISSING = (200, 40, 40)
UNKNOWN = (40, 40, 90)  # pixels without depth


def summary(manifest: Manifest) -> Iterator[str]:
    """The printed lines."""
    metadata = manifest.metadata
    size = manifest.path.stat().st_size / 1e6
    yield f"{manifest.path}: {manifest.num_sequences} sequences, {manifest.num_frames} frames, {size:.1f} MB"
    yield f"root: {manifest.root}"
    skipped = {"root", "counts", "options"}
    yield ", ".join(f"{key}: {value}" for key, value in metadata.items() if key not in skipped)
    if metadata.get("options"):
        yield "options: " + ", ".join(f"{key} {value}" for key, value in metadata["options"].items())
    for what, count in manifest.known.items():
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
    yield f"{'frames':>9} {'sequences':>10}"
    counts = np.bincount(np.searchsorted(BINS, lengths, side="right") - 1, minlength=len(BINS))
    used = np.flatnonzero(counts)
    for i in range(used[0], used[-1] + 1):
        last = BINS[i + 1] - 1 if i + 1 < len(BINS) else None
        label = str(BINS[i]) if last == BINS[i] else f"{BINS[i]}-{last}" if last else f"{BINS[i]} on"
        yield f"{label:>9} {counts[i]:>10} {'#' * -(-BAR * counts[i] // counts.max())}"


Listing = tuple[Path, list[str]]  # a folder, and names of files that should be in it


def missing_files(folders: Sequence[Listing]) -> list[Path]:
    """The files that are missing in their folders. A picklable task."""
    missing = []
    for folder, names in folders:
        present = set(names_in(folder))
        missing += [folder / name for name in names if name not in present]
    return missing


def find_missing(
    manifest: Manifest, column: str = "path", progress: bool = False, threads: int = THREADS, ray: str | None = None
) -> tuple[int, list[Path]]:
    """Number of different files of a column ("path", "depth", "mask"), and those missing in their folders' listings.

    Lists folders in this many threads, or on a Ray cluster.
    """
    folders, missing = list(manifest.folders(column)), []
    step = 1 if ray is None else FOLDERS
    groups = [folders[i : i + step] for i in range(0, len(folders), step)]
    total = sum(len(names) for _, names in folders)
    with progress_bar(total=total, desc="checking", show=progress) as bar:
        found = spread(missing_files, groups, threads=threads, ray=ray, paths=(manifest.root,))
        for group, files in zip(groups, found, strict=True):
            missing += files
            bar.update(sum(len(names) for _, names in group))
    return total, missing


def _check_files(manifest: Manifest, threads: int, ray: str | None) -> int:
    """Print the missing files; returns the exit code."""
    code = 0
    for column, what in FILES.items():
        if column != "path" and not manifest.present(column).any():
            continue
        stored = is_url(manifest.root) or manifest.has_archives(column)
        find, fault = (find_damaged, "damaged") if stored else (find_missing, "missing")
        total, found = find(manifest, column, True, threads, ray)
        print(f"\n{fault}: {len(found)} of {total} {what}")
        print("".join(f"  {file}\n" for file in [*found[:NAMED], *["..."] * (len(found) > NAMED)]), end="")
        code |= bool(found)
    return code


def contact_sheet(manifest: Manifest, sequences: int = 12, seed: int = 0, tile: int = 96) -> Image.Image:
    """Random sequences, each with as many random frames as training might draw, in order; depth below its frames.

    Shows the centre square of a frame, `tile` pixels wide; unreadable files are red.
    """
    rng = np.random.default_rng(seed)
    count = min(sequences, manifest.num_sequences)
    strips = [_strip(manifest, i, rng, tile) for i in np.sort(rng.choice(manifest.num_sequences, count, replace=False))]
    return Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips]))


def _strip(manifest: Manifest, sequence: int, rng: np.random.Generator, tile: int) -> Image.Image:
    """A line of text, then the frames of one sequence, every line of frames followed by its depth if there is any."""
    first, end = manifest.starts[sequence : sequence + 2].tolist()
    views = min(int(rng.integers(VIEWS[0], VIEWS[1] + 1)), end - first)
    rows = first + np.sort(rng.choice(end - first, views, replace=False))
    depths = [manifest.depth_file(row) for row in rows.tolist()]
    lines = 2 if any(depths) else 1
    pitch = tile + GAP
    strip = Image.new("RGB", (COLUMNS * pitch - GAP, LABEL + -(-views // COLUMNS) * lines * pitch + GAP), "white")
    dataset = manifest.datasets[manifest.dataset_of[sequence]]
    text = f"{dataset}: {manifest.sequence_name(sequence)} ({views} of {end - first})"
    plain = text.encode("latin-1", "replace").decode("latin-1")  # what the built-in font can draw
    ImageDraw.Draw(strip).text((1, 1), plain, fill="black", font=ImageFont.load_default())
    for i, (file, depth) in enumerate(zip(manifest.files(rows), depths, strict=True)):
        left, top = i % COLUMNS * pitch, LABEL + i // COLUMNS * lines * pitch
        strip.paste(_thumbnail(file, tile), (left, top))
        if depth is not None:
            strip.paste(_depth_thumbnail(*depth, tile), (left, top + pitch))
    return strip


def _thumbnail(file: Path, tile: int) -> Image.Image:
    """The middle square, as training sees it."""
    frames, bad = PillowDecoder(tile).decode([file], whole_frames(1), np.zeros(1, bool))
    return Image.new("RGB", (tile, tile), MISSING) if bad else Image.fromarray(frames[0].numpy())


def _depth_thumbnail(file: Path, format: DepthFormat, tile: int) -> Image.Image:
    """Inverse depth in grey, near is bright, between the 2nd and 98th percentile of the map."""
    try:
        depth = read_depth(file, format)
    except DataError:
        return Image.new("RGB", (tile, tile), MISSING)
    known = depth > 0
    inverse = 1 / np.where(known, depth, 1)
    low, high = np.percentile(inverse[known], (2, 98)) if known.any() else (0, 1)
    grey = 255 * np.clip((inverse - low) / max(high - low, 1e-9), 0, 1)[..., None]
    image = Image.fromarray(np.where(known[..., None], grey, UNKNOWN).astype(np.uint8))
    return ImageOps.fit(image, (tile, tile), Image.Resampling.NEAREST)


def held_out_summary(manifests: Manifests, share: float, resolve: bool = False) -> tuple[str, int]:
    """What a run on the manifests holds out, in one line, and how many of these images it trains on.

    `resolve` links below the roots for any number of images.
    """
    held, excluded = hold_out(manifests, share)
    if not len(held):
        return f"held out at data.held_out={share:g}: nothing, since there is one scene at most", 0
    found = image_overlap(manifests, excluded, ~excluded, manifests.num_frames if resolve else MOST_LOOKED_UP)
    scenes = len({*zip(manifests.dataset_of[held].tolist(), manifests.scene_names(held), strict=True)})
    what = f"{scenes} scenes, {len(held)} sequences, {found.images} images"
    example = f", such as '{found.example[0]}'" if found.example else ""
    overlap = f"overlap with training: {found.shared} images{example}"
    return f"held out at data.held_out={share:g}: {what}; {overlap}", found.shared


def _inspect(file: str, args: argparse.Namespace) -> int:
    manifest = Manifest(file)
    print("\n".join(summary(manifest)))
    if not args.no_sheet:
        sheet = args.sheet or manifest.path.with_name(f"{manifest.path.stem}_sheet.jpg")
        try:
            contact_sheet(manifest, args.sequences, args.seed).save(sheet, quality=85)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            remedy = "its name ends in .jpg or .png (--no-sheet writes none)"
            raise DataError(f"--sheet '{sheet}' cannot be written ({reason}); {remedy}") from None
        print(f"\ncontact sheet: {sheet}")
    return _check_files(manifest, args.workers, args.ray) if args.check else 0


def _command(args: argparse.Namespace) -> int:
    for name, least in (("sequences", 1), ("seed", 0), ("workers", 1)):
        if (value := getattr(args, name)) < least:
            raise DataError(f"--{name} is {value}, but must be at least {least}")
    if not 0 < args.held_out < 1:
        raise DataError(f"--held-out is {args.held_out:g}, but must lie between 0 and 1")
    if args.sheet and len(args.files) > 1:
        raise DataError(f"--sheet names one picture for {len(args.files)} manifests; leave it out")
    try:
        with cluster(args.ray if args.check else None, args.workers):
            code = max([_inspect(file, args) for file in args.files])
        line, shared = held_out_summary(Manifests(args.files), args.held_out, args.check)
        print(f"\n{line}")
        code |= bool(args.check and shared)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (flushed at exit)
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    description = "What manifests contain: sequences, frames, lengths, data sets, their making, and what is held out."
    parser = argparse.ArgumentParser(prog=program("fastmum.data.inspect"), description=description)
    parser.add_argument("files", nargs="+", metavar="FILE", help="the manifests of a run")
    check = (
        "look for missing files, read those in archives and stores and compare their checksums, and look through links "
        "for images on both sides; exit code 1 if there are any"
    )
    parser.add_argument("--check", action="store_true", help=check)
    share = "data.held_out of the run (default %(default)s)"
    parser.add_argument("--held-out", type=float, default=0.1, metavar="S", help=share)
    sheet = parser.add_mutually_exclusive_group()
    help = "contact sheet of sampled sequences with their depth (default: <stem of FILE>_sheet.jpg next to FILE)"
    sheet.add_argument("--sheet", type=Path, metavar="PATH", help=help)
    sheet.add_argument("--no-sheet", action="store_true", help="write no contact sheet")
    parser.add_argument("--sequences", type=int, default=12, metavar="N", help="on the sheet (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sheet's samples (default %(default)s)")
    add_arguments(parser, THREADS, "threads of --check")
    args = parser.parse_args(argv)
    return run_command(lambda: _command(args))


if __name__ == "__main__":
    import fastmum.data.inspect  # tasks are pickled by the name of their module

    sys.exit(fastmum.data.inspect.main())
