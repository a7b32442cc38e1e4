"""Photographs to cameras, depth maps and a point cloud, by a run of reconstruction."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastmum.data.colmap_writer import Points, write_model
from fastmum.data.evaluation import evaluation_size, pad
from fastmum.engine.device import pick_device
from fastmum.errors import FastmumError, some_reasons, writing
from fastmum.features.images import Images, find_images
from fastmum.files import expand_user, read_json, write_atomic
from fastmum.geometry import Camera, View, crop_resize
from fastmum.geometry.camera import rigid_inverse, transform
from fastmum.predict.cloud import glb, ply
from fastmum.predict.viewer import require_plotly, viewer
from fastmum.progress import progress_bar
from fastmum.tasks.reconstruction.infer import Estimate, estimate, load_run

FARTHEST = 100.0  # median depths; what is farther is unknown in the depth maps, whose steps it sets
LEVELS = 65535  # of a depth map
SEED = 0  # of the points that are kept


class Photo(NamedTuple):
    """An image in the middle of the model's input."""

    name: str  # below the folder of images
    image: np.ndarray  # (H, W, 3) uint8, padded
    size: tuple[int, int]  # width and height of the upright original
    box: tuple[int, int, int, int]  # left, top, right, bottom in the input

    @property
    def inside(self) -> tuple[slice, slice]:
        """Rows and columns of the image."""
        left, top, right, bottom = self.box
        return slice(top, bottom), slice(left, right)

    def camera(self, pose: np.ndarray, K: np.ndarray) -> Camera:
        """The camera of the original from that of the input."""
        left, top, right, bottom = self.box
        K = K.copy()
        K[:2, 2] -= left, top
        return Camera(K, pose, (right - left, bottom - top)).resized(self.size)

    def resize(self, values: np.ndarray) -> np.ndarray:
        """A map of the input (H, W) at the size of the original, bilinear."""
        part = torch.from_numpy(values[self.inside])[None, None]
        return F.interpolate(part, self.size[::-1], mode="bilinear", antialias=True)[0, 0].numpy()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this task."""
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="folders of images of one scene, image files, or patterns")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    add("--size", type=int, metavar="PX", help="longer side that images are resized to (default: as in training)")
    add("--confidence", type=float, default=25.0, metavar="P", help="percentage of the pixels, those of the lowest "
        "confidence, that give no point (%(default)s)")  # fmt: skip
    add("--max-points", type=int, default=200_000, metavar="N", help="points of the cloud (%(default)s)")
    add("--no-page", action="store_true", help="no page with the point cloud, which needs plotly")


def predict(args: argparse.Namespace) -> None:
    """Run the command."""
    if not 0 <= args.confidence < 100 or args.max_points < 1:
        raise FastmumError("--confidence must be from 0 to below 100, and --max-points at least 1")
    out = expand_user(args.out)
    if out.exists() and not out.is_dir():
        raise FastmumError(f"--out: '{out}' is a file, but must be a folder")
    if not args.no_page:
        require_plotly("pass --no-page")
    images = find_images(args.images)
    trained = load_run(args.run, pick_device(args.device, key="--device"), args.encoder)
    size = trained.image_size if args.size is None else args.size
    photos = read_photos(images, size, trained.model.config.patch_size)
    pixels = np.stack([photo.image for photo in photos])
    photos = [photo._replace(image=image) for photo, image in zip(photos, pixels, strict=True)]  # kept once
    found = estimate(trained.model, torch.from_numpy(pixels), show=True)
    source = {"run": trained.name, "step": trained.step, "encoder": trained.encoder["name"], "images": str(images.root)}
    write_results(out, photos, found, source, args.confidence, args.max_points, not args.no_page)
    print(f"{len(photos)} of {len(images.files)} images: {out}")
    if images.skipped:
        print("skipped:", some_reasons(images.skipped))


def read_photos(images: Images, longest: int, patch_size: int) -> list[Photo]:
    """Read images in the order of their names, resized as in evaluations, and padded with white to one size.

    Unreadable ones are put into `images.skipped`; FastmumError if all are.
    """
    views, sizes, names = [], [], []
    for file in progress_bar(images.files, unit="image", desc="reading", leave=False):
        if (pixels := images.read(file)) is None:
            continue
        view = View(pixels)
        size = evaluation_size(view.size, longest, patch_size)
        views.append(crop_resize(view, None, size, resample=Image.Resampling.BICUBIC))
        sizes.append(view.size)
        names.append(images.name(file))
    if not views:
        raise FastmumError(f"none of the images can be read: {some_reasons(images.skipped, 3)}")
    whole = max(view.size[0] for view in views), max(view.size[1] for view in views)
    photos = []
    for name, view, size in zip(names, views, sizes, strict=True):
        left, top = (whole[0] - view.size[0]) // 2, (whole[1] - view.size[1]) // 2
        photos.append(Photo(name, pad(view, whole).image, size, (left, top, left + view.size[0], top + view.size[1])))
    return photos


def choose_points(
    photos: list[Photo], cameras: list[Camera], found: Estimate, percentile: float, most: int
) -> Points:  # fmt: skip
    """World points of at most `most` random pixels, without the given percentage of lowest confidence.

    They are unprojected from the depth, not of the head of points, so each projects to its pixel.
    """
    inside = np.zeros(found.depth.shape, bool)
    for mask, photo in zip(inside, photos, strict=True):
        mask[photo.inside] = True
    inside &= np.isfinite(found.depth) & np.isfinite(found.confidence)
    if inside.any():
        inside &= found.confidence >= np.percentile(found.confidence[inside], percentile)
    starts = np.cumsum([0, *inside.sum((1, 2))])
    count = starts[-1]
    chosen = np.random.default_rng(SEED).choice(count, most, replace=False) if count > most else np.arange(count)
    kept = np.sort(chosen)  # numbers of pixels among those inside, frame by frame
    frame = np.searchsorted(starts, kept, side="right") - 1
    xy, xyz, rgb = np.empty((len(kept), 2)), np.empty((len(kept), 3)), np.empty((len(kept), 3), np.uint8)
    for i, (photo, camera) in enumerate(zip(photos, cameras, strict=True)):
        own = slice(*np.searchsorted(kept, starts[i : i + 2]))
        y, x = np.divmod(np.flatnonzero(inside[i])[kept[own] - starts[i]], found.depth.shape[2])
        left, top, right, bottom = photo.box
        scale = photo.size[0] / (right - left), photo.size[1] / (bottom - top)
        xy[own] = (np.stack([x, y], 1) + 0.5 - (left, top)) * scale
        rays = np.c_[xy[own], np.ones(len(y))] @ np.linalg.inv(camera.K).T
        xyz[own] = transform(rigid_inverse(camera.camera_from_world), rays * found.depth[i, y, x, None])
        rgb[own] = photo.image[y, x]
    return Points(xyz, rgb, frame, xy)


def write_results(
    out: Path, photos: list[Photo], found: Estimate, source: dict[str, object], percentile: float = 25.0,
    most: int = 200_000, page: bool = True,
) -> None:  # fmt: skip
    """Write all files of a prediction: sparse/0, cameras.json, depth, cloud.ply, cloud.glb and view.html.

    Those of an earlier one are replaced, and its other depth maps deleted. FastmumError: files cannot be written, or
    nothing finite was predicted.
    """
    poses = zip(photos, found.camera_from_world, found.K, strict=True)
    cameras = [photo.camera(pose, K) for photo, pose, K in poses]
    points = choose_points(photos, cameras, found, percentile, most)
    if not len(points.xyz) or not all(
        np.isfinite(x).all() for camera in cameras for x in (camera.K, camera.camera_from_world)
    ):
        raise FastmumError("the model predicts no finite cameras and depth; use an earlier checkpoint")
    step = FARTHEST * float(np.median(found.depth[np.isfinite(found.depth)])) / LEVELS
    write_model(out / "sparse/0", [photo.name for photo in photos], cameras, points)
    frames = []
    with writing(out, FastmumError):
        _delete_earlier(out)
        for i, photo in enumerate(progress_bar(photos, unit="image", desc="writing", leave=False)):
            file = out / "depth" / f"{photo.name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            steps = np.nan_to_num(photo.resize(found.depth[i]) / step, nan=0.0, posinf=0.0).round()
            Image.fromarray(np.where(steps <= LEVELS, steps, 0).astype(np.uint16)).save(file)
            frames.append(
                {"file": photo.name, "size": photo.size, "depth": f"depth/{photo.name}.png",
                 "K": cameras[i].K.tolist(), "T_cam_world": cameras[i].camera_from_world.tolist()}
            )  # fmt: skip
        content = source | {"depth_unit": step, "frames": frames}
        write_atomic(out / "cameras.json", json.dumps(content, indent=1) + "\n")
        cloud = points.xyz, points.rgb
        write_atomic(out / "cloud.ply", ply(*cloud))
        write_atomic(out / "cloud.glb", glb(*cloud))
        if page:
            names = [photo.name for photo in photos]
            write_atomic(out / "view.html", viewer(*cloud, cameras, names, f"{source['run']}: {source['images']}"))


def _delete_earlier(out: Path) -> None:
    """Delete page and depth maps of an earlier prediction: those that its cameras.json names, in the folder `depth`."""
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = read_json(out / "cameras.json")
        names = [frame["depth"] for frame in content["frames"] if "run" in content]
        (out / "view.html").unlink(missing_ok=True)
    folder = (out / "depth").resolve()
    for file in (out / name for name in names):
        if file.resolve().parent.is_relative_to(folder):
            file.unlink(missing_ok=True)
