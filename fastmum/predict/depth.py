"""Depth maps of images by a head that `fastmum evaluate depth` trained."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from fastmum.engine.device import pick_device
from fastmum.errors import FastmumError, some_reasons, writing
from fastmum.features.images import find_images
from fastmum.features.probe import probe_encoder, read_probe
from fastmum.files import expand_user
from fastmum.progress import progress_bar
from fastmum.tasks.depth import HEADS, DepthHead, predict_depth, resize, scaled
from fastmum.tasks.pictures import colours

LEVELS = 65535  # millimetres in a 16-bit image; what is farther has this value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this task."""
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="folders of images, image files, or patterns")
    add("--out", type=Path, default=Path("predictions"), metavar="DIR", help="folder of the results (%(default)s)")
    add("--size", type=int, metavar="PX", help="longer side that images are resized to (default: that of the test set)")


def predict(args: argparse.Namespace) -> None:
    """Write `depth/NAME.png`, 16-bit millimetres of the size of the image, and `colour/NAME.jpg` next to the image."""
    if args.size is not None and args.size < 1:
        raise FastmumError(f"--size is {args.size}, but must be at least 1")
    images, probe = find_images(args.images), read_probe(expand_user(args.run))
    about, device = probe.about, pick_device(args.device, key="--device")
    encoder = probe_encoder(probe, args.encoder).to(device)
    head = DepthHead.of(encoder, HEADS[about["head"]], about["max_depth"], about["loss"]).eval()
    head.load_state_dict(dict(probe.tensors))
    out = expand_user(args.out)
    for file in progress_bar(images.files, unit="image", desc="predicting"):
        if (pixels := images.read(file)) is None:
            continue
        image = Image.fromarray(pixels)
        size = scaled(image.size, args.size or about["size"])
        depth = predict_depth([head], encoder, np.asarray(image.resize(size, Image.Resampling.BILINEAR)))
        write_depth(out, images.name(file), image, resize(depth[None], image.size[::-1])[0, 0].numpy())
    if len(images.skipped) == len(images.files):
        raise FastmumError(f"none of the images can be read: {some_reasons(images.skipped, 3)}")
    print(f"{len(images.files) - len(images.skipped)} of {len(images.files)} images: {out}")
    if images.skipped:
        print("skipped:", some_reasons(images.skipped))


def write_depth(out: Path, name: str, image: Image.Image, depth: np.ndarray) -> None:
    """Write the files of an image and its depth (H, W), metres."""
    maps, pictures = out / "depth" / f"{name}.png", out / "colour" / f"{name}.jpg"
    drawn = Image.new("RGB", (2 * image.width, image.height))
    drawn.paste(image, (0, 0))
    drawn.paste(Image.fromarray(colours(depth, *np.percentile(depth, [2, 98]))), (image.width, 0))
    with writing(out, FastmumError):
        for file in (maps, pictures):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((1000 * depth).round().clip(0, LEVELS).astype(np.uint16)).save(maps)
        drawn.save(pictures, quality=90)
