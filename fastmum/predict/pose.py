"""Two photographs to the pose of the second camera in the axes of the first, by a run of relative pose."""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from fastmum.engine.device import pick_device
from fastmum.errors import FastmumError, writing
from fastmum.files import expand_user, free_path
from fastmum.geometry import View
from fastmum.geometry.camera import intrinsics_matrix, rigid_inverse
from fastmum.predict.photos import read_photo
from fastmum.tasks.pose.infer import estimate, load_run, prepare
from fastmum.tasks.pose.pictures import PairView, draw_pairs, pose_matrix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this task."""
    add = parser.add_argument
    add("images", nargs=2, metavar="IMAGE", help="two image files, of any sizes")
    add("--json", action="store_true", help="print JSON")
    add("--out", type=Path, default=Path(), metavar="DIR", help="folder of the picture with epipolar lines (here)")
    add("--fov", type=float, default=60.0, metavar="DEG", help="horizontal field of view of both cameras, which the "
        "lines need and the pose does not (%(default)s)")  # fmt: skip
    add("--size", type=int, metavar="PX", help="side of the square that is cropped and resized (default: as trained)")


def predict(args: argparse.Namespace) -> None:
    """Run the command."""
    if not 0 < args.fov < 180:
        raise FastmumError(f"--fov is {args.fov:g}, but must be between 0 and 180 degrees")
    files = [expand_user(file) for file in args.images]
    views = [View(read_photo(file)) for file in files]
    trained = load_run(args.run, pick_device(args.device, key="--device"), args.encoder)
    size, patch = args.size or trained.image_size, trained.model.config.patch_size
    if size % patch or size < patch:
        raise FastmumError(f"--size is {size}, but must be a multiple of the patch size {patch}")
    images = np.stack([prepare(view, size, file).image for view, file in zip(views, files, strict=True)])
    R, t = (x[0] for x in estimate(trained.model, images[None]))
    if not (np.isfinite(R).all() and np.isfinite(t).all()):
        raise FastmumError(f"'{args.run}' predicts no finite pose; use an earlier checkpoint")
    found = describe(R, t)
    picture = free_path(expand_user(args.out) / f"{files[0].stem}-{files[1].stem}-pose", ".jpg")
    source = {"run": trained.name, "step": trained.step, "images": [str(file) for file in files]}
    drawn = None
    try:
        with writing(picture, FastmumError):
            picture.parent.mkdir(parents=True, exist_ok=True)
            draw(views, R, t, args.fov, f"{files[0].name}, {files[1].name}").save(picture, quality=90)
        drawn = str(picture)
    finally:  # the numbers are printed whether there is a picture or not
        print(json.dumps(source | found | {"picture": drawn}, indent=1) if args.json else text(found, drawn))


def describe(R: np.ndarray, t: np.ndarray) -> dict[str, Any]:
    """The pose in numbers, degrees: of camera 2 in the axes of camera 1, x right, y down, z forward; x_1 = R x_2 + t.

    Yaw is to the right, pitch up, roll clockwise, as seen from camera 1, applied in the reverse order. Azimuth is to
    the right of the viewing direction, elevation up. The length of a translation is unknown: it is 1, or 0.
    """
    length = np.linalg.norm(t)
    direction = t / length if length > 0 else t
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a pitch of 90 degrees, where yaw and roll are not unique
        angles = Rotation.from_matrix(R).as_euler("YXZ", degrees=True)
    x, y, z = direction
    return {
        "rotation": R.tolist(), "translation_direction": direction.tolist(),
        "rotation_angle": float(np.degrees(Rotation.from_matrix(R).magnitude())),
        **dict(zip(("yaw", "pitch", "roll"), angles.tolist(), strict=True)),
        "azimuth": float(np.degrees(np.arctan2(x, z))), "elevation": float(np.degrees(np.arctan2(-y, np.hypot(x, z)))),
    }  # fmt: skip


def text(found: dict[str, Any], picture: str | None) -> str:
    """The pose for people."""
    rows = "\n".join("  " + " ".join(f"{value:8.4f}" for value in row) for row in found["rotation"])
    x, y, z = found["translation_direction"]
    return (
        "camera 2 in the axes of camera 1 (x right, y down, z forward):\n"
        f"rotation {found['rotation_angle']:.2f}°: yaw {found['yaw']:.2f}° to the right, "
        f"pitch {found['pitch']:.2f}° up, roll {found['roll']:.2f}° clockwise\n{rows}\n"
        f"translation direction ({x:.4f}, {y:.4f}, {z:.4f}): azimuth {found['azimuth']:.2f}° to the right, "
        f"elevation {found['elevation']:.2f}° up\nepipolar lines: {picture or 'none'}"
    )


def draw(views: list[View], R: np.ndarray, t: np.ndarray, fov: float, name: str) -> Any:
    """The images with points and epipolar lines, for cameras of a horizontal field of view in degrees."""
    Ks = []
    for view in views:
        width, height = view.size
        focal = width / 2 / np.tan(np.radians(fov) / 2)
        Ks.append(intrinsics_matrix(focal, focal, width / 2, height / 2))
    images, (K_a, K_b) = (views[0].image, views[1].image), Ks
    return draw_pairs([PairView(name, images, (K_a, K_b), rigid_inverse(pose_matrix(R, t)))])
