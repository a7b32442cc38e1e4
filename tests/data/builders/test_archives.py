"""Builders on archives: the sequences, cameras and depth that they find in folders, and files with the same bytes."""

import shutil
import tarfile
import zipfile

import pytest
from test_colmap_models import TestAnyModel, TestMegaDepth, TestMegaScenes  # noqa: F401
from test_depth_and_cameras import test_the_world_point_of_a_pixel  # noqa: F401
from test_scenes import (  # noqa: F401
    test_arkitscenes,
    test_blendedmvs,
    test_co3d_cameras_depth_and_masks,
    test_co3d_released_takes_the_training_split_of_41_categories,
    test_co3d_takes_whole_sequences_of_at_least_24_frames,
    test_dl3dv,
    test_hypersim,
    test_hypersim_cameras_and_depth,
    test_imagenet,
    test_realestate10k,
    test_scannetpp_takes_the_training_list,
    test_streetview3d_and_the_size_of_chunks,
    test_wildrgbd,
)  # fmt: skip

import fastmum.data.build as builds


def tar(folder, out, **options):
    """The files of a folder, by their paths below it."""
    with tarfile.open(out, "w", **options) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.add(file, file.relative_to(folder).as_posix())
    return out


def zipped(folder, out, compression=zipfile.ZIP_DEFLATED):
    """As `tar`."""
    with zipfile.ZipFile(out, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return out


def in_parts(raw, out):
    """Each folder in its archive, a stored zip, or a tar in a tar; files at the top and every third one below stay."""
    shutil.copytree(raw, out)
    loose = sorted(file.relative_to(out) for file in out.rglob("*/*") if file.is_file())[::3]
    for number, folder in enumerate(sorted(path for path in out.iterdir() if path.is_dir())):
        (inside := out / "inside").mkdir()
        folder.rename(inside / folder.name)
        for file in (file for file in loose if file.parts[0] == folder.name):
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (inside / file).rename(out / file)
        if number % 2:
            zipped(inside, out / f"part{number}.zip", zipfile.ZIP_STORED)
        else:
            inner = tar(inside, out / "inner.tar", format=tarfile.PAX_FORMAT)
            with tarfile.open(out / f"part{number}.tar", "w", format=tarfile.GNU_FORMAT) as archive:
                archive.add(inner, "inner.tar")
            inner.unlink()
        shutil.rmtree(inside)
    return out


PACKINGS = {
    "zip": lambda raw, out: zipped(raw, out.with_suffix(".zip")),
    "tar": lambda raw, out: tar(raw, out.with_suffix(".tar")),
    "parts": in_parts,
}


@pytest.fixture(
    params=["parts", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zip", "tar"))], autouse=True
)
def packed(request, monkeypatch, tmp_path):
    """Builders in imported tests see what is in `raw` in archives only."""
    if "real_models" in request.node.name:
        pytest.skip("links to folders are not packed")
    build, numbers = builds.build, iter(range(1000))

    def build_packed(name, raw, out, **options):
        folder = tmp_path / f"packed{next(numbers)}"
        folder.mkdir()
        return build(name, PACKINGS[request.param](raw, folder / raw.name), out, **options)

    monkeypatch.setattr(builds, "build", build_packed)
