"""The command line: `python -m fastmum.features IMAGES --weights W --out FILE`."""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from itertools import islice

from fastmum.data.spread import add_ray_argument, cluster
from fastmum.engine.device import pick_device
from fastmum.errors import program, run_command
from fastmum.features.extract import extract
from fastmum.features.images import FeaturesError, Sizing, find_images
from fastmum.features.pictures import write_pictures
from fastmum.features.store import SUFFIXES, check_file, write_features
from fastmum.files import expand_user
from fastmum.pretrained import build, read_pretrained
from fastmum.pretrained.arguments import SPECS, add_overrides, parse_overrides

MAX_NAMES = 10  # skipped images listed in the output


def _size(text: str) -> tuple[int, int] | None:
    if text == "native":
        return None
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text.lower())
    if sides is None:
        raise FeaturesError(f"--size is '{text}', but must be native, a number of pixels, or HEIGHTxWIDTH")
    return int(sides[1]), int(sides[2] or sides[1])


def _layers(text: str | None, depth: int) -> int | list[int] | None:
    if text is None:
        return None
    if re.fullmatch(r"\d+", text) and 1 <= int(text) <= depth:
        return int(text)
    numbers = text.split(",") if re.fullmatch(r"[\d,]*,[\d,]*", text) else []
    layers = sorted({int(number) for number in numbers if number})
    if not layers or layers[-1] >= depth:
        raise FeaturesError(f"--layers is '{text}', but must be a number, 1 to {depth}, or blocks, 0 to {depth - 1}")
    return layers


def _run(args: argparse.Namespace) -> None:
    if args.batch < 1 or args.max_side < 0:
        raise FeaturesError(f"--batch {args.batch} and --max-side {args.max_side} must be at least 1 and 0")
    size = _size(args.size)
    check_file(args.out, args.force)
    images = find_images(args.images)
    overrides = parse_overrides(args.overrides, {"device": "--device", "dtype": "--dtype"})
    pretrained = read_pretrained(args.weights, **{**overrides, "encoder_only": True})
    depth, patch_size = pretrained.config.depth, pretrained.config.patch_size
    layers, sizing = _layers(args.layers, depth), Sizing(patch_size, size, args.fit, args.max_side)
    device = "cpu" if args.ray else pick_device(args.device, key="--device")
    encoder = build(pretrained, device, args.dtype).requires_grad_(False)
    with cluster(args.ray):
        features = extract(
            encoder, images, sizing, layers, not args.no_norm, args.batch, True, ray=args.ray, ray_device=args.device
        )
    about = {
        "weights": args.weights, "encoder": pretrained.about, "images": str(images.root),
        "layers": layers if isinstance(layers, list) else list(range(depth - (layers or 1), depth)),
        "norm": not args.no_norm, "size": args.size, "fit": args.fit, "max_side": args.max_side,
        "skipped": images.skipped,
    }  # fmt: skip
    write_features(args.out, features, about)
    first = next(iter(features.values()))
    print(f"{args.out}: {len(features)} images, patch tokens of the first: {list(first.patch.shape)}")
    if not args.no_pictures:
        folder = args.pictures or args.out.with_name(f"{args.out.stem}_pictures")
        write_pictures(folder, images, features, patch_size)
        print(f"pictures: {folder}")
    if images.skipped:
        lines = [f"  {name}: {why}" for name, why in islice(images.skipped.items(), MAX_NAMES)]
        lines += ["  ..."] * (len(images.skipped) > MAX_NAMES)
        print(f"skipped: {len(images.skipped)} of {len(images.files)} images", *lines, sep="\n", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("fastmum.features"),
        description="CLS and patch tokens of images, and a picture of each image's patch tokens.",
        epilog=SPECS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="folders of images, image files, or patterns in quotes")
    add("--weights", required=True, metavar="W", help="weights of an encoder, see below")
    add("--out", type=expand_user, required=True, metavar="FILE", help=f"ends in {' or '.join(SUFFIXES)}")
    size = "native (each image's size, rounded to a multiple of the patch size), a number, or HEIGHTxWIDTH"
    add("--size", default="native", metavar="S", help=f"{size} (default %(default)s)")
    add("--fit", choices=("resize", "pad"), default="resize", help="pad: keep the aspect ratio (default %(default)s)")
    add("--max-side", type=int, default=1024, metavar="N", help="limit for native size; 0: none (default %(default)s)")
    layers = "number of last blocks, or indices such as 5,11,17,23 or `11,`; default: the last"
    add("--layers", metavar="L", help=layers)
    add("--no-norm", action="store_true", help="without the encoder's last norm")
    add("--batch", type=int, default=16, metavar="B", help="images computed together (default %(default)s)")
    add("--dtype", default="float32", metavar="T", help="float32, bfloat16 or float16 (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N (default %(default)s)")
    add_ray_argument(parser)
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--pictures", type=expand_user, metavar="FOLDER", help="default: <stem of FILE>_pictures")
    pictures.add_argument("--no-pictures", action="store_true", help="draw no pictures")
    add("--force", action="store_true", help="replace FILE")
    add_overrides(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # which weights were loaded
    return run_command(lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
