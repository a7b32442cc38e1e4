"""The command line: `python -m fastmum.features IMAGES --weights W --out FILE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmum.features.errors import FeaturesError
from fastmum.features.extract import Tokens, extract
from fastmum.features.images import Images, Sizing, find_images
from fastmum.features.pictures import write_pictures
from fastmum.features.store import SUFFIXES, check_file, write_features
from fastmum.pretrained import WeightsError, build, read_pretrained
from fastmum.pretrained.arguments import add_overrides, parse_overrides
from fastmum.pretrained.device import pick_device

NAMED = 10  # skipped images to name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastmum.features",
        description="CLS and patch tokens of images, and a picture of each image's patch tokens.",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="folders with images in them, image files, or patterns in quotes"
    )
    parser.add_argument(
        "--weights", required=True, metavar="W", help="a run, a checkpoint, or a file that load_pretrained reads"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"ends in {' or '.join(SUFFIXES)}")
    parser.add_argument(
        "--size", default="native", metavar="S",
        help="native: each image keeps its own, to the next multiple of the patch size; or a side of a square, or "
        "HEIGHTxWIDTH (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--fit", choices=("resize", "pad"), default="resize",
        help="how an image gets there: resized, or padded at the right and bottom, which keeps its aspect (default "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-side", type=int, default=1024, metavar="N",
        help="larger images of native size are scaled down to this; 0: never (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", metavar="L",
        help="the last so many blocks, or a list of blocks counted from 0, such as 5,11,17,23 (11, for one); default: "
        "the last",
    )  # fmt: skip
    parser.add_argument("--no-norm", action="store_true", help="without the encoder's last norm")
    parser.add_argument("--batch", type=int, default=16, metavar="B", help="images at once (default %(default)s)")
    parser.add_argument(
        "--dtype", default="float32", metavar="T", help="float32, bfloat16 or float16 (default %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default %(default)s)")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--pictures", type=Path, metavar="FOLDER", help="default: <stem of FILE>_pictures beside it")
    pictures.add_argument("--no-pictures", action="store_true", help="draw none")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    add_overrides(parser)
    return parser


def _size(text: str) -> tuple[int, int] | None:
    if text == "native":
        return None
    try:
        sides = [int(side) for side in text.lower().split("x")]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise FeaturesError(f"--size is '{text}', but must be native, a number of pixels, or HEIGHTxWIDTH") from None
    return height, width


def _layers(text: str | None, depth: int) -> int | list[int] | None:
    if text is None:
        return None
    try:
        layers = [int(number) for number in text.split(",") if number] if "," in text else int(text)
    except ValueError:
        raise FeaturesError(f"--layers is '{text}', but must be a number of blocks, or blocks such as 5,11") from None
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise FeaturesError(f"--layers is {text}, but the encoder has {depth} blocks: 1 to {depth}")
        return layers
    if not layers or not all(0 <= number < depth for number in layers):
        raise FeaturesError(f"--layers is {text}, but the encoder's blocks are 0 to {depth - 1}")
    return sorted(set(layers))


def _about(args: argparse.Namespace, images: Images, layers: int | list[int] | None, depth: int) -> dict[str, Any]:
    numbers = layers if isinstance(layers, list) else list(range(depth - (layers or 1), depth))
    return {
        "weights": args.weights, "images": str(images.root), "layers": numbers, "norm": not args.no_norm,
        "size": args.size, "fit": args.fit, "max_side": args.max_side, "skipped": images.skipped,
    }  # fmt: skip


def _run(args: argparse.Namespace) -> tuple[Images, dict[str, Tokens], Path | None]:
    if args.batch < 1 or args.max_side < 0:
        raise FeaturesError(f"--batch {args.batch} and --max-side {args.max_side} must be at least 1 and 0")
    size = _size(args.size)
    check_file(args.out, args.force)
    images = find_images(args.images)
    overrides = parse_overrides(args.overrides, {"device": "--device", "dtype": "--dtype"})
    pretrained = read_pretrained(args.weights, **{**overrides, "encoder_only": True})
    depth, patch_size = pretrained.config.depth, pretrained.config.patch_size
    layers, sizing = _layers(args.layers, depth), Sizing(patch_size, size, args.fit, args.max_side)
    encoder = build(pretrained, pick_device(args.device), args.dtype)
    features = extract(encoder, images, sizing, layers, not args.no_norm, args.batch, progress=True)
    write_features(args.out, features, _about(args, images, layers, depth))
    if args.no_pictures:
        return images, features, None
    folder = args.pictures or args.out.with_name(f"{args.out.stem}_pictures")
    write_pictures(folder, images, features, patch_size, progress=True)
    return images, features, folder


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        images, features, folder = _run(args)
    except (FeaturesError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    first = next(iter(features.values()))
    print(f"{args.out}: {len(features)} images, patch tokens of the first: {list(first.patch.shape)}")
    if folder:
        print(f"pictures: {folder}")
    if images.skipped:
        print(f"skipped: {len(images.skipped)} of {len(images.files)} images", file=sys.stderr)
        for name, why in list(images.skipped.items())[:NAMED]:
            print(f"  {name}: {why}", file=sys.stderr)
        if len(images.skipped) > NAMED:
            print("  ...", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
