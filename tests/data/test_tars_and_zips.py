"""Tar and zip archives: their members are read in place, damaged archives and members are named."""

import contextlib
import io
import tarfile
import zipfile

import numpy as np
import pytest
from stored import contents

from fastmum.data import store
from fastmum.data.archives import open_root
from fastmum.data.build import build
from fastmum.data.decode.image import FrameError, read_file
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifest


def test_zips(image_folder, tmp_path):
    zip = tmp_path / "raw/scenes.zip"
    zip.parent.mkdir()
    with zipfile.ZipFile(zip, "w", zipfile.ZIP_DEFLATED) as archive:
        for i, file in enumerate(sorted(image_folder.rglob("*.png"))):
            method = zipfile.ZIP_STORED if i % 2 else zipfile.ZIP_DEFLATED
            archive.write(file, file.relative_to(image_folder).as_posix(), method)
    build("folder", zip.parent, tmp_path / "zip.arrow")
    manifest = Manifest(tmp_path / "zip.arrow")
    assert contents(manifest) == [file.read_bytes() for file in sorted(image_folder.rglob("*.png"))]
    pytest.importorskip("fsspec").filesystem("memory").put_file(str(zip), "/moved/scenes.zip")
    for folder in ("", "scene0"):  # of the archive, the root
        build("folder", zip / folder, tmp_path / "inside.arrow")
        right = contents(Manifest(tmp_path / "inside.arrow"))
        assert contents(Manifest(tmp_path / "inside.arrow", {"folder": f"memory://moved/scenes.zip/{folder}"})) == right
    (zip.parent / "README.txt").touch()
    assert not (open_root(zip.parent) / "README.txt/images").is_dir()
    data = bytearray(zip.read_bytes())
    for row in (0, 1):
        data[manifest.file(row).place.offset + 60] ^= 1
    zip.write_bytes(data)
    store._handles.clear()
    for row, bad in ((0, True), (1, True), (2, False)):
        with pytest.raises(FrameError, match="holds") if bad else contextlib.nullcontext():
            read_file(manifest.file(row))


def future_zip():
    """A zip archive that needs version 9.9 of its format."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("0.jpg", b"0")
    return file.getvalue().replace(b"PK\1\2\x14\3\x14", b"PK\1\2\x14\3\x63")


@pytest.mark.parametrize("content", [b"PK\3\4", b"", bytes(300) + b"x" * 300, future_zip()])
def test_archives_that_are_none_are_named(tmp_path, image_folder, content):
    for suffix in (".zip", ".tar"):
        (image_folder / f"broken{suffix}").write_bytes(content)
        if content or suffix == ".zip":
            with pytest.raises(DataError, match=rf"^[^\n]*broken\{suffix}' cannot be read as an archive[^\n]*$"):
                build("folder", image_folder, tmp_path / "a.arrow")
        (image_folder / f"broken{suffix}").unlink()


def test_tars_that_are_cut_off_or_damaged_and_members_that_cannot_be_read(tmp_path, image_folder, caplog):
    (raw := tmp_path / "raw").mkdir()
    with tarfile.open(raw / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(image_folder, "images")
    whole = (raw / "a.tar").read_bytes()
    build("folder", raw, tmp_path / "m.arrow")
    places = [file.place for file in Manifest(tmp_path / "m.arrow").files(np.arange(24))]
    last = max(places, key=lambda place: place.offset)
    damaged = bytearray(whole)
    damaged[places[9].offset - 300] ^= 1  # in a header
    for content in (whole[: last.offset + 100], whole[: last.offset - 100], damaged, whole + whole):
        (raw / "a.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"^[^\n]*a\.tar' cannot be read as an archive \(it is cut off[^\n]*$"):
            build("folder", raw, tmp_path / "m.arrow")
    (raw / "a.tar").write_bytes(whole[: last.offset + (last.length + 511) // 512 * 512])
    build("folder", raw, tmp_path / "m.arrow")
    assert "a.tar' lacks its end mark" in caplog.text
    with zipfile.ZipFile(raw / "b.zip", "w") as archive:
        archive.writestr("0.jpg", b"0", zipfile.ZIP_LZMA)
        archive.writestr("1.jpg", b"1")
    build("folder", raw, tmp_path / "m.arrow")
    assert "b.zip': 1 files are left out" in caplog.text
    assert Manifest(tmp_path / "m.arrow").num_frames == 25


def add_member(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_imagenet_as_it_is_distributed_and_shards_of_others(tmp_path):
    """A tar with a flat tar for each class; a flat shard is a folder of its name."""
    images = {f"{name}/{name}_{i}.JPEG": f"{name} {i}".encode() for name in ("n01", "n02") for i in range(3)}
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in ("n01", "n02"):
            with tarfile.open(fileobj=(inner := io.BytesIO()), mode="w") as archive:
                for path, content in images.items():
                    if path.startswith(name):
                        add_member(archive, path.partition("/")[2], content)
            add_member(outer, f"{name}.tar", inner.getvalue())
    long = "é" * 60 + "/" + "x" * 120 + ".jpg"
    with tarfile.open(tmp_path / "000.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("0.jpg", "0.json", "../1.jpg", long):
            add_member(archive, name, name.encode())
    shard = {"000/0.jpg": b"0.jpg", f"000/{long}": long.encode()}
    for name, expected in (("imagenet", images | {"000/0.jpg": b"0.jpg"}), ("folder", images | shard)):
        build(name, tmp_path, tmp_path / "out/m.arrow")
        manifest = Manifest(tmp_path / "out/m.arrow")
        paths = manifest.paths("path", np.arange(manifest.num_frames))
        assert dict(zip(paths, contents(manifest), strict=True)) == expected
    build("imagenet", tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "out/m.arrow")
    assert contents(Manifest(tmp_path / "out/m.arrow")) == list(images.values())
