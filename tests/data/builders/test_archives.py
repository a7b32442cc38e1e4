"""Builders on archives: the sequences, cameras and depth that they find in folders, and files with the same bytes."""

import shutil
import tarfile
import zipfile

import pytest
import test_depth_and_cameras as maps

from fastmum.data.build import build


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
    """Each folder in its archive, next to the files at the top, which stay: a stored zip, or a tar in a tar."""
    shutil.copytree(raw, out)
    for number, folder in enumerate(sorted(path for path in out.iterdir() if path.is_dir())):
        (inside := out / "inside").mkdir()
        folder.rename(inside / folder.name)
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


@pytest.fixture(params=PACKINGS)
def packed(request, monkeypatch, tmp_path):
    """Lets builders see what is in `raw` in archives only."""
    packings = iter(range(100))

    def build_packed(name, raw, out, **options):
        return build(name, PACKINGS[request.param](raw, tmp_path / f"packed{next(packings)}"), out, **options)

    for module in (maps, __import__("conftest", fromlist=["build"])):
        monkeypatch.setattr(module, "build", build_packed)
