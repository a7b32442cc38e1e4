"""Two photographs to a dense warp and matches, or the matches of many photographs to a COLMAP database, by RoMa."""

import argparse
import itertools
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fastmum.data.decode.image import read_size, stored_points
from fastmum.engine.device import pick_device
from fastmum.errors import FastmumError, some_reasons, writing
from fastmum.features.images import Images, find_images
from fastmum.files import atomic_path, expand_user
from fastmum.predict.matches_db import PairMatches, import_images, require_pycolmap, write_matches
from fastmum.predict.photos import ONE_COLOUR, one_colour, read_photo
from fastmum.progress import progress_bar
from fastmum.tasks.pictures import colours, tiles
from fastmum.tasks.roma.infer import Warps, load_run, match, pixels, sample
from fastmum.tasks.roma.pictures import moved

KEPT = 16  # images in memory; pairs come sorted by their first image
MOST_MATCHES = 250_000_000  # of a database: about 60 bytes of memory each, until it is written
SHOWN = 60  # matches in the picture
SIDE = 480  # pixels: height of its images

Matcher = Callable[[np.ndarray, np.ndarray], tuple[Tensor, Tensor]]  # images (H, W, 3) uint8 -> results of `sample`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this task."""
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="two images; with --colmap folders of images, files or patterns")
    add("--out", type=Path, metavar="DIR", help="folder of the warp, matches and pictures of two images (matches)")
    add("--colmap", type=Path, metavar="FILE", help="COLMAP database to write with the matches of all pairs of images")
    add("--pairs", type=Path, metavar="FILE", help="--colmap: only these pairs, the names of two images a line")
    add("--matches", type=int, default=5000, metavar="N", help="matches of a pair, at most (%(default)s)")
    add("--cell", type=float, default=2.0, metavar="PX", help="--colmap: points of an image in the same cell of so "
        "many pixels are one keypoint, so that tracks span several pairs (%(default)s)")  # fmt: skip
    add("--certainty", type=float, default=0.05, metavar="P", help="least certainty of a match (%(default)s)")
    add("--size", type=int, metavar="PX", help="side that images are resized to for the first pass (default: as in "
        "training); the second one is at 864 / 560 of it")  # fmt: skip
    add("--one-pass", action="store_true", help="no second pass: faster, and less exact")
    add("--seed", type=int, default=0, metavar="S", help="of the choice of matches (%(default)s)")


def predict(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.matches < 1 or not args.cell > 0 or not 0 <= args.certainty <= 1:
        raise FastmumError("--matches must be at least 1, --cell positive, and --certainty from 0 to 1")
    if args.out is not None and args.colmap is not None:
        raise FastmumError("--out is of two images, --colmap of many: give one of them")
    if args.pairs is not None and args.colmap is None:
        raise FastmumError("--pairs chooses pairs of many images: give --colmap FILE, too")
    images = find_images(args.images)
    if args.colmap is None:
        if len(images.files) != 2:
            raise FastmumError(f"two images are matched, but {len(images.files)} are given; --colmap FILE is for many")
        photos = read_photo(images.files[0]), read_photo(images.files[1])
    else:
        require_pycolmap()
        pairs = read_pairs(args.pairs, images) if args.pairs else [*itertools.combinations(images.files, 2)]
        if not pairs:
            raise FastmumError(f"'{args.pairs}' names no pair" if args.pairs else "--colmap needs at least two images")
        if (fits := MOST_MATCHES // args.matches) < len(pairs):
            raise FastmumError(
                f"{len(pairs):,} pairs of up to {args.matches:,} matches (--matches) may not fit in memory, {fits:,} "
                "pairs do: lower --matches, or choose pairs by --pairs FILE"
            )
        if expand_user(args.colmap).exists():
            raise FastmumError(f"'{args.colmap}' exists: remove it, or name another file")
    trained = load_run(args.run, pick_device(args.device, key="--device"), args.encoder)
    patch = trained.model.config.patch_size
    if args.size is not None and (args.size < patch or args.size % patch or args.size % 8):
        raise FastmumError(f"--size is {args.size}, but must be a multiple of 8 and of the patch size {patch}")
    generator = torch.Generator().manual_seed(args.seed)

    def sampled(a: np.ndarray, b: np.ndarray) -> tuple[Warps, Tensor, Tensor]:
        warps = match(trained, a, b, args.size, not args.one_pass)
        matches, certainty = sample(warps, args.matches, generator)
        kept = certainty >= args.certainty
        return warps, matches[kept], certainty[kept]

    if args.colmap is None:
        out = args.out or Path("matches")
        write_pair(expand_user(out), photos, *sampled(*photos))
        print(f"warp, matches and pictures: {out}")
        return
    file = expand_user(args.colmap)
    found, keypoints, matches = write_database(file, images, pairs, lambda a, b: sampled(a, b)[1:], args.cell)
    print(f"{found} of {len(pairs)} pairs, {keypoints} keypoints, {matches} matches: {args.colmap}")
    if images.skipped:
        print("skipped:", some_reasons(images.skipped))


def read_pairs(file: Path, images: Images) -> list[tuple[Path, Path]]:
    """Pairs of a text file, two names below the folder of images a line; FastmumError names a line that is none.

    A pair counts once, in either order.
    """
    known, pairs = {images.name(each): each for each in images.files}, dict[frozenset[str], tuple[Path, Path]]()
    try:
        lines = expand_user(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise FastmumError(f"--pairs: '{file}' cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        line = line.strip()
        splits = [(line[: blank.start()], line[blank.end() :]) for blank in re.finditer(r"\s+", line)]
        found = [(a, b) for a, b in splits if a != b and a in known and b in known]  # names may have blanks
        if found:
            pairs.setdefault(frozenset(found[0]), (known[found[0][0]], known[found[0][1]]))
        elif line:
            raise FastmumError(f"--pairs: line {number} of '{file}' is not the names of two of the images")
    return [*pairs.values()]


def write_database(
    file: Path, images: Images, pairs: Sequence[tuple[Path, Path]], matcher: Matcher, cell: float
) -> tuple[int, int, int]:
    """Match pairs and write a COLMAP database; returns the numbers of matched pairs, keypoints and matches.

    The file appears when it is complete. Images that COLMAP or `match_pairs` cannot read go into `images.skipped`.
    """
    names = sorted({images.name(each) for pair in pairs for each in pair})
    with writing(file, FastmumError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as partial:
            partial.touch()
            ids = import_images(partial, images.root, names)
            images.skipped |= {name: "COLMAP cannot read it" for name in names if name not in ids}
            known = [pair for pair in pairs if all(images.name(each) in ids for each in pair)]
            found = match_pairs(images, known, matcher)
            return len(found), *write_matches(partial, ids, found, cell)


def match_pairs(images: Images, pairs: Sequence[tuple[Path, Path]], matcher: Matcher) -> list[PairMatches]:
    """Matches of pairs in pixels of their files, as COLMAP reads them.

    Images that cannot be read, or are of one colour, go into `images.skipped`; FastmumError if no pair is left.
    """
    found = list[PairMatches]()

    @lru_cache(KEPT)
    def read(file: Path) -> tuple[np.ndarray, int] | None:
        """An upright image, and how it was turned."""
        image = images.read(file)
        if image is not None and one_colour(image):
            images.skipped[images.name(file)], image = ONE_COLOUR, None
        return None if image is None else (image, read_size(file)[0])

    def stored(points: Tensor, image: np.ndarray, orientation: int) -> np.ndarray:
        height, width = image.shape[:2]
        return stored_points(pixels(points, (width, height)), orientation, width, height).astype(np.float32)

    for a, b in progress_bar(pairs, unit="pair", desc="matching"):
        if (first := read(a)) is None or (second := read(b)) is None:
            continue
        matches, certainty = matcher(first[0], second[0])
        points = stored(matches[:, :2], *first), stored(matches[:, 2:], *second)
        found.append(PairMatches(images.name(a), images.name(b), *points, certainty.numpy()))
    if not found:
        raise FastmumError(f"no pair can be matched: {some_reasons(images.skipped, 3)}")
    return found


def write_pair(
    out: Path, images: tuple[np.ndarray, np.ndarray], warps: Warps, matches: Tensor, certainty: Tensor
) -> None:
    """Write warp.npz, matches.npz, warp.png and matches.png; FastmumError: they cannot be written."""
    first, second = (image.shape[1::-1] for image in images)
    points = np.split(pixels(matches, (*first, *second)), 2, axis=1)
    files = {
        "warp": {
            "first_to_second": pixels(warps.points[0], second).astype(np.float32),
            "second_to_first": pixels(warps.points[1], first).astype(np.float32),
            "certainty_first": warps.certainty[0].numpy(), "certainty_second": warps.certainty[1].numpy(),
        },
        "matches": {"first": points[0], "second": points[1], "certainty": certainty.numpy()},
    }  # fmt: skip
    with writing(out, FastmumError):
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with atomic_path(out / f"{name}.npz") as path, open(path, "wb") as stream:
                np.savez_compressed(stream, **content)  # type: ignore[arg-type]
        draw_warps(images, warps).save(out / "warp.png")
        draw_lines(images, points, certainty).save(out / "matches.png")


def draw_warps(images: Sequence[np.ndarray], warps: Warps) -> Image.Image:
    """Both images, each as seen from the other, and the certainties."""
    a, b = (torch.from_numpy(image) for image in images)
    certainties = [colours(each.numpy(), 0, 1) for each in warps.certainty]
    return tiles([
        ("first image", a), ("second, warped", moved(b, warps.points[0])), ("certainty", certainties[0]),
        ("second image", b), ("first, warped", moved(a, warps.points[1])), ("certainty", certainties[1]),
    ], 3)  # fmt: skip


def draw_lines(images: Sequence[np.ndarray], points: Sequence[np.ndarray], certainty: Tensor) -> Image.Image:
    """The images side by side, with lines between some of the matches."""
    from matplotlib import colormaps

    scales = [SIDE / image.shape[0] for image in images]
    small = [Image.fromarray(image).resize((max(1, round(image.shape[1] * s)), SIDE))
             for image, s in zip(images, scales, strict=True)]  # fmt: skip
    page = Image.new("RGB", (small[0].width + small[1].width, SIDE))
    page.paste(small[0], (0, 0))
    page.paste(small[1], (small[0].width, 0))
    draw = ImageDraw.Draw(page)
    for i in range(0, len(certainty), max(1, len(certainty) // SHOWN)):
        colour = colormaps["turbo"](float(certainty[i]), bytes=True)[:3]
        first, second = points[0][i] * scales[0], points[1][i] * scales[1] + (small[0].width, 0)
        draw.line([*first, *second], tuple(map(int, colour)), 1)
    return page
