"""Frames from shards, object stores and stages equal those of loose files; damage is never another image."""

import contextlib
import io
import json
import logging
import os
import pickle
import shutil
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from processes import wait_for

from fastmum.config import load_config
from fastmum.data import remote, staging, store
from fastmum.data.build import build
from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import FrameError, read_file
from fastmum.data.errors import DataError
from fastmum.data.inspect import main as inspect
from fastmum.data.loader import Loader
from fastmum.data.manifest import Manifest, Manifests, SequenceRecord, write_manifest
from fastmum.data.pack import Settings, pack
from fastmum.data.pack import main as pack_command
from fastmum.data.plan import StepPlanner
from fastmum.data.splits import open_splits
from fastmum.data.store import Place, StoredPath
from fastmum.data.unpack import unpack

SMALL = Settings(shard_gb=2e-5)  # a few sequences of a few images


@pytest.fixture
def loose(image_folder, tmp_path):
    """The manifest of a folder of four scenes of six images."""
    build("folder", image_folder, tmp_path / "lists/scenes.arrow", dataset="scenes")
    return tmp_path / "lists/scenes.arrow"


@pytest.fixture
def shards(loose, tmp_path):
    """The manifest of its shards."""
    pack(loose, tmp_path / "shards", SMALL)
    return tmp_path / "shards/scenes.arrow"


@pytest.fixture
def no_stage():
    """Ends staging after a test."""
    yield
    staging.start(None, 0)


def contents(manifest):
    return [read_file(file) for file in manifest.files(np.arange(manifest.num_frames))]


def batches(manifests, count=3, workers=2):
    """Decoded frames of the first steps of a run."""
    planner = StepPlanner(manifests, frames_per_gpu=8, views=(2, 4), seed=3)
    loader = Loader(make_decoder("pillow", 32), manifests, workers)
    found = [batch.frames for batch in loader.batches(planner.plan(step, 0) for step in range(count))]
    assert not loader.faults.counts
    return torch.stack(found)


class TestShards:
    def test_shards_hold_whole_sequences_that_tar_and_webdataset_read(self, loose, shards):
        before, after = Manifests([loose]), Manifests([shards])
        assert contents(before.parts[0]) == contents(after.parts[0])
        assert np.array_equal(before.starts, after.starts)
        assert torch.equal(batches(before), batches(after))
        tars = sorted(shards.parent.glob("*.tar"))
        assert len(tars) > 1
        places = [file.place for file in after.files(np.arange(after.num_frames))]
        for first, end in zip(after.starts, after.starts[1:], strict=False):
            assert len({place.store for place in places[first:end]}) == 1
        with tarfile.open(tars[0]) as tar:
            names = tar.getnames()
        assert names[:2] == ["scenes/scene0/000000.png", "scenes/scene0/000001.png"]
        wds = pytest.importorskip("webdataset")
        samples = list(wds.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False))
        assert [sample["png"] for sample in samples] == contents(before.parts[0])

    def test_equal_bytes_for_any_number_of_workers_and_after_an_interruption(self, loose, shards, tmp_path):
        out = tmp_path / "again"
        pack(loose, out, SMALL, workers=2)
        files = {file.name: file.read_bytes() for file in shards.parent.iterdir()}
        assert {file.name: file.read_bytes() for file in out.iterdir()} == files
        kept = out / "scenes-000000.tar"
        time = kept.stat().st_mtime_ns
        (out / "scenes.arrow").unlink()
        (out / "scenes-000001.index").unlink()
        (out / ".partial-1-scenes-000001.tar").write_bytes(b"left by a kill")
        pack(loose, out, SMALL)
        assert kept.stat().st_mtime_ns == time
        assert {name: (out / name).read_bytes() for name in files} == files

    def test_unpack_is_the_inverse(self, image_folder, loose, shards, tmp_path):
        unpack(shards, tmp_path / "out", workers=2)
        manifest = Manifest(tmp_path / "out/scenes.arrow")
        assert contents(manifest) == contents(Manifest(loose))
        assert [manifest.paths("path", np.arange(24))] == [Manifest(loose).paths("path", np.arange(24))]
        shutil.move(tmp_path / "out", tmp_path / "moved")  # files and manifest move together
        assert contents(Manifest(tmp_path / "moved/scenes.arrow")) == contents(Manifest(loose))

    def test_images_shrink_with_their_cameras_and_shared_frames_are_stored_once(self, tmp_path):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6  # shown as 40 x 80
        for i in range(3):
            image.save(tmp_path / f"{i}.JPG", exif=exif)
        image.resize((16, 12)).save(tmp_path / "small.png")
        K = np.array([[50, 60, 20, 40]] * 3 + [[9, 9, 8, 6]], np.float32)
        records = [SequenceRecord("a.b/c", ["0.JPG", "1.JPG", "2.JPG", "small.png"], intrinsics=K)]
        records.append(SequenceRecord("other", ["2.JPG", "0.JPG"], scene="a.b/c"))
        write_manifest(tmp_path / "m.arrow", records, dataset="d", root=tmp_path, metadata={"rule": "own"})
        pack(tmp_path / "m.arrow", tmp_path / "out", Settings(short_side=20))
        made = Manifest(tmp_path / "out/m.arrow")
        assert [Image.open(io.BytesIO(data)).size for data in contents(made)] == [(20, 40)] * 3 + [(16, 12)] + [
            (20, 40)
        ] * 2
        assert made.camera_arrays(0)[0].tolist() == [25, 30, 10, 20]
        assert made.camera_arrays(3)[0].tolist() == [9, 9, 8, 6]
        assert made.camera_arrays(4) == (None, None)
        assert [made.file(i).place for i in (4, 5)] == [made.file(i).place for i in (2, 0)]
        assert made.scene_names(np.arange(2)) == ["a.b/c", "a.b/c"]
        with tarfile.open(tmp_path / "out/m-000000.tar") as tar:
            assert tar.getnames()[:3] == ["d/a.b/c/000000.jpg", "d/a.b/c/000000.json", "d/a.b/c/000001.jpg"]
            assert json.load(tar.extractfile("d/a.b/c/000000.json")) == {"intrinsics": [25.0, 30.0, 10.0, 20.0]}

    def test_what_cannot_be_read_stops_or_is_skipped(self, image_folder, loose, tmp_path, refusal, caplog):
        bad = sorted(image_folder.glob("scene1/*"))[2]
        bad.write_bytes(bad.read_bytes()[:100])
        assert f"{bad}' cannot be packed" in refusal(pack_command, loose, "--out", tmp_path / "o", "--workers", 0)
        assert "would be replaced" in refusal(pack_command, loose, "--out", loose.parent)
        assert "shard-gb" in refusal(pack_command, loose, "--out", tmp_path / "o", "--shard-gb", 0)
        assert pack(loose, tmp_path / "o", SMALL._replace(broken="skip")).frames == 23
        assert "1 images were skipped" in caplog.text


class TestDamage:
    def damaged(self, shards, capsys):
        code = inspect([str(shards), "--check", "--no-sheet"])
        return code, [line for line in capsys.readouterr().out.splitlines() if line.startswith("  '")]

    def test_other_bytes_are_never_an_image(self, shards, capsys):
        """A truncated shard, one of another, one whose members moved, one with other pixels, another index."""
        first, second, *_ = tars = sorted(shards.parent.glob("*.tar"))
        whole, other = first.read_bytes(), second.read_bytes()
        assert self.damaged(shards, capsys) == (0, [])
        manifest = Manifest(shards)
        right = contents(manifest)
        mine = [file.place.store == str(first) for file in manifest.files(np.arange(manifest.num_frames))]
        for content in (whole[:1000], other, bytes(512) + whole[:-512], b""):
            replacement = first.with_name("new")  # as tools do that copy: open files keep the old content
            replacement.write_bytes(content)
            os.replace(replacement, first)
            store._handles.clear()
            for file, hit, data in zip(manifest.files(np.arange(manifest.num_frames)), mine, right, strict=True):
                if hit:
                    with pytest.raises(FrameError, match=f"{first}' (is cut off|holds another file) at byte"):
                        read_file(file)
                else:
                    assert read_file(file) == data
            code, lines = self.damaged(shards, capsys)
            assert code == 1
            assert len(lines) == min(10, sum(mine))
        start = manifest.file(0).place.offset
        first.write_bytes(whole[: start + 99] + b"?" + whole[start + 100 :])
        code, lines = self.damaged(shards, capsys)
        assert code == 1
        assert len(lines) == 1
        assert "another checksum" in lines[0]
        first.write_bytes(whole)
        shutil.copy(tars[1].with_suffix(".index"), first.with_suffix(".index"))
        code, lines = self.damaged(shards, capsys)
        assert code == 1
        assert all("is not in" in line and "pack again" in line for line in lines)
        first.with_suffix(".index").write_bytes(b"?")
        assert self.damaged(shards, capsys)[0] == 1

    def test_a_run_stops_with_one_line(self, shards):
        for tar in shards.parent.glob("*.tar"):
            tar.write_bytes(tar.read_bytes()[:1000])
        store._handles.clear()
        with pytest.raises(DataError, match=r"^[^\n]*cannot be decoded[^\n]*$"):
            batches(Manifests([shards]))

    def test_zips(self, image_folder, tmp_path):
        zip = tmp_path / "raw/scenes.zip"
        zip.parent.mkdir()
        with zipfile.ZipFile(zip, "w", zipfile.ZIP_DEFLATED) as archive:
            for i, file in enumerate(sorted(image_folder.rglob("*.png"))):
                method = zipfile.ZIP_STORED if i % 2 else zipfile.ZIP_DEFLATED
                archive.write(file, file.relative_to(image_folder).as_posix(), method)
        build("folder", zip.parent, tmp_path / "zip.arrow")
        manifest = Manifest(tmp_path / "zip.arrow")
        assert contents(manifest) == [file.read_bytes() for file in sorted(image_folder.rglob("*.png"))]
        data = bytearray(zip.read_bytes())
        for row in (0, 1):
            data[manifest.file(row).place.offset + 60] ^= 1
        zip.write_bytes(data)
        store._handles.clear()
        for row, bad in ((0, True), (1, True), (2, False)):
            with pytest.raises(FrameError, match="holds") if bad else contextlib.nullcontext():
                read_file(manifest.file(row))

    @pytest.mark.parametrize("content", [b"PK\3\4", b"", bytes(300) + b"x" * 300])
    def test_archives_that_are_none_are_named(self, tmp_path, image_folder, content):
        for suffix in (".zip", ".tar"):
            (image_folder / f"broken{suffix}").write_bytes(content)
            if content or suffix == ".zip":
                with pytest.raises(DataError, match=rf"^[^\n]*broken\{suffix}' cannot be read as an archive[^\n]*$"):
                    build("folder", image_folder, tmp_path / "a.arrow")
            (image_folder / f"broken{suffix}").unlink()


def test_tars_that_are_cut_off_and_members_that_cannot_be_read(tmp_path, image_folder, caplog):
    (raw := tmp_path / "raw").mkdir()
    with tarfile.open(raw / "a.tar", "w") as archive:
        archive.add(image_folder, "images")
    whole = (raw / "a.tar").read_bytes()
    build("folder", raw, tmp_path / "m.arrow")
    places = [file.place for file in Manifest(tmp_path / "m.arrow").files(np.arange(24))]
    last = max(places, key=lambda place: place.offset)
    (raw / "a.tar").write_bytes(whole[: last.offset + 100])
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


def test_roots_move_without_a_rebuild(loose, shards, image_folder, tmp_path, monkeypatch):
    right = contents(Manifest(loose))
    shutil.move(image_folder, tmp_path / "elsewhere")
    moved = str(tmp_path / "elsewhere")
    assert contents(Manifests([loose], {"scenes": moved}).parts[0]) == right
    with pytest.raises(DataError, match=r"data\.roots\.rooms"):
        Manifests([loose], {"rooms": moved})
    monkeypatch.setenv("FASTMUM_ROOT_SCENES", moved)
    assert contents(Manifest(loose)) == right
    assert pickle.loads(pickle.dumps(Manifests([loose], {"scenes": "/given"}))).file(0) == Path("/given/scene0/0.png")
    monkeypatch.delenv("FASTMUM_ROOT_SCENES")
    config = load_config(None, [f"data.manifests=[{loose}]", f"data.roots.scenes={moved}", "data.views=[2,4]"])
    assert contents(open_splits(config, tmp_path / "run").manifests.parts[0]) == right


class TestStage:
    @pytest.mark.parametrize("kind", ["loose", "shards"])
    def test_frames_are_copied_ahead_and_read_from_there(self, request, kind, tmp_path, no_stage, monkeypatch):
        manifest = request.getfixturevalue(kind)
        right = batches(Manifests([manifest]), 6)
        staging.start(str(tmp_path / "scratch"), 1)
        fetched, fetch = [], store.fetch
        monkeypatch.setattr(store, "fetch", lambda place: fetched.append(place) or fetch(place))
        opened = Manifest(manifest)
        files = opened.files(np.arange(24))
        monkeypatch.setattr(staging, "STEPS_AHEAD", 2)
        plans = staging.copied_ahead(iter([[0], [1, 2], [3], [4]]), opened.files)
        assert next(plans) == [0]
        wait_for(lambda: all(staging._stage.read(files[row].place) for row in (1, 2)))
        assert [*plans] == [[1, 2], [3], [4]]
        assert torch.equal(batches(Manifests([manifest]), 6), right)
        for file in files:
            staging._stage.copy(file.place)
        fetched.clear()
        assert torch.equal(batches(Manifests([manifest]), 6), right)
        assert not fetched
        # Damaged copies are not taken for the files, nor those of a file that was replaced.
        for copy in (tmp_path / "scratch").rglob("*"):
            if copy.is_file():
                copy.write_bytes(copy.read_bytes()[:-1] + b"?")
        assert torch.equal(batches(Manifests([manifest]), 6), right)

    def test_the_oldest_copies_make_room(self, loose, tmp_path, no_stage):
        staging.start(str(tmp_path / "scratch"), 20e-6)
        for file in Manifest(loose).files(np.arange(24)):
            staging._stage.copy(file.place)
        size = sum(file.stat().st_size for file in (tmp_path / "scratch").rglob("*") if file.is_file())
        assert 5_000 < size < 25_000 < sum(map(len, contents(Manifest(loose))))

    def test_a_full_disk_and_what_kills_leave(self, loose, tmp_path, no_stage, monkeypatch, caplog):
        folder = tmp_path / "scratch/fastmum-stage"
        folder.mkdir(parents=True)
        (folder / ".partial-999999999-1").write_bytes(b"half")
        staging.start(str(tmp_path / "scratch"), 1)
        assert not list(folder.glob(".partial*"))
        right = contents(Manifest(loose))
        monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=OSError(28, "No space left on device")))
        for file in Manifest(loose).files(np.arange(24)):
            staging._stage.copy(file.place)
        assert contents(Manifest(loose)) == right
        assert caplog.text.count("No space left") == 1
        monkeypatch.undo()
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match=r"file/fastmum-stage' cannot be written"):
            staging.start(str(tmp_path / "file"), 1)

    def test_two_processes_stage_the_same_files(self, shards, tmp_path, no_stage):
        staging.start(str(tmp_path / "scratch"), 1)
        files = Manifest(shards).files(np.arange(24))
        threads = [
            threading.Thread(target=lambda: [staging._stage.copy(file.place) for file in files]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [staging._stage.read(file.place) for file in files] == contents(Manifest(shards))


@pytest.fixture(scope="module")
def s3():
    """The URL of a bucket of a server on this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


class TestObjectStores:
    def test_shards_and_loose_objects_give_the_frames_of_the_disk(
        self, s3, loose, image_folder, tmp_path, monkeypatch, no_stage
    ):
        monkeypatch.setenv("FASTMUM_CACHE", str(tmp_path / "cache"))
        right = batches(Manifests([loose]))
        assert pack(loose, f"{s3}/shards", SMALL) == pack(loose, f"{s3}/shards", SMALL)
        packed = f"{s3}/shards/scenes.arrow"
        config = load_config(None, [f"data.manifests=[{packed}]", "data.views=[2,4]"])
        manifests = open_splits(config, tmp_path / "run").manifests
        assert str(manifests.file(0)) == f"{s3}/shards/scene0/0.png"
        assert torch.equal(batches(manifests), right)
        assert inspect([packed, "--check", "--no-sheet"]) == 0
        import s3fs

        s3fs.S3FileSystem().put(str(image_folder), "bucket/loose", recursive=True)
        assert torch.equal(batches(Manifests([loose], {"scenes": f"{s3}/loose"})), right)
        staging.start(str(tmp_path / "scratch"), 1)
        assert torch.equal(batches(Manifests([loose], {"scenes": f"{s3}/loose"})), right)
        unpack(packed, tmp_path / "back")
        assert contents(Manifest(tmp_path / "back/scenes.arrow")) == contents(Manifest(loose))

    def test_an_outage_is_waited_for(self, s3, loose, monkeypatch, caplog, tmp_path):
        monkeypatch.setenv("FASTMUM_CACHE", str(tmp_path / "cache"))
        pack(loose, f"{s3}/outage", SMALL)
        manifests, right = Manifests([f"{s3}/outage/scenes.arrow"]), batches(Manifests([loose]))
        system, _ = remote.file_system(s3)
        cat, failures = system.cat_file, iter(range(40))

        def failing(path, **options):
            if next(failures, None) is not None:
                raise OSError(16, "An error occurred (503): Slow Down")
            return cat(path, **options)

        monkeypatch.setattr(remote, "FIRST_S", 0.01)
        monkeypatch.setattr(system, "cat_file", failing)
        assert torch.equal(batches(manifests), right)
        assert caplog.text.count("Slow Down") == 1
        monkeypatch.setattr(remote, "RETRY_S", 0.05)
        failures = iter(range(10**9))
        with pytest.raises(FrameError, match="Slow Down") as caught:
            read_file(manifests.file(0))
        assert caught.value.transient

    def test_wrong_names_and_credentials_are_one_line_before_the_run(self, s3, loose, tmp_path, monkeypatch):
        def opened(root):
            config = load_config(None, [f"data.manifests=[{loose}]", f"data.roots.scenes={root}", "data.views=[2,4]"])
            return open_splits(config, tmp_path / "run")

        for root, reason in (
            ("s3://none", "bucket does not exist"), (f"{s3}/none", "key does not exist"), ("nope://x", "nope"),
        ):  # fmt: skip
            with pytest.raises(DataError, match=rf"^'{root}[^\n]*{reason}[^\n]*$"):
                opened(root)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("HOME", str(tmp_path))
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(DataError, match=r"^[^\n]*credentials[^\n]*$"):
            opened(f"{s3}/loose")
        monkeypatch.setitem(sys.modules, "s3fs", None)
        s3fs.S3FileSystem.clear_instance_cache()


def test_paths_of_stores_are_paths(tmp_path):
    url = StoredPath("s3://bucket/folder") / "a/b.jpg"
    assert (str(url), url.name, url.suffix, str(url.parent)) == (
        "s3://bucket/folder/a/b.jpg",
        "b.jpg",
        ".jpg",
        "s3://bucket/folder/a",
    )
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    file = StoredPath.at("/x/y.txt", Place(str(tmp_path / "a.bin")))
    for same in (file, pickle.loads(pickle.dumps(file))):
        assert (same.is_file(), same.is_dir(), same.read_text()) == (True, False, "0123456789")
        assert same.place == file.place
    assert not StoredPath("s3://bucket/x").exists()
