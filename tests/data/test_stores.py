"""Frames from moved roots, object stores and stages equal those of loose files."""

import logging
import pickle
import shutil
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from processes import FORKSERVER, wait_for
from stored import SMALL, batches, contents, stage

from fastmum.config import load_config
from fastmum.data import remote, staging, store
from fastmum.data.decode.image import FrameError, read_file
from fastmum.data.errors import DataError
from fastmum.data.inspect import main as inspect
from fastmum.data.manifest import Manifest, Manifests
from fastmum.data.pack import pack
from fastmum.data.splits import open_splits
from fastmum.data.spread import spread
from fastmum.data.store import Place, StoredPath
from fastmum.data.unpack import unpack


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


def test_the_folder_of_a_run_may_lie_in_an_archive(loose, image_folder, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path, image_folder.name)
    config = load_config(None, [f"data.root={archive}/{image_folder.name}", "data.views=[2,4]"])
    assert contents(open_splits(config, tmp_path / "run").manifests.parts[0]) == contents(Manifest(loose))


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

    def test_processes_and_threads_stage_the_same_files(self, shards, tmp_path):
        right = contents(Manifest(shards))
        with FORKSERVER.Pool(2) as pool:
            found = [pool.apply_async(stage, (shards, tmp_path / "scratch")) for _ in range(2)]
            assert [each.get(60) for each in found] == [right, right]
        assert not [*(tmp_path / "scratch").rglob(".partial*")]


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
        self, s3, loose, masked, image_folder, tmp_path, monkeypatch, no_stage
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

        pack(loose, tmp_path / "local", SMALL)
        s3fs.S3FileSystem().put(str(tmp_path / "local"), "bucket/uploaded", recursive=True)
        uploaded = pickle.loads(pickle.dumps(Manifests([f"{s3}/uploaded/scenes.arrow"])))
        assert str(uploaded.file(0)).startswith(f"{s3}/uploaded/")
        assert torch.equal(batches(uploaded), right)
        s3fs.S3FileSystem().put(str(image_folder), "bucket/scenes", recursive=True)
        s3fs.S3FileSystem().put(str(tmp_path / "co3d"), "bucket/co3d", recursive=True)
        assert torch.equal(batches(Manifests([loose], {"scenes": f"{s3}/scenes"})), right)
        staging.start(str(tmp_path / "scratch"), 1)
        assert torch.equal(batches(Manifests([loose], {"scenes": f"{s3}/scenes"})), right)
        for given, name in ((loose, "scenes"), (masked, "co3d")):
            pack(given, tmp_path / "of_files", SMALL)
            monkeypatch.setenv(f"FASTMUM_ROOT_{name.upper()}", f"{s3}/{name}")
            pack(given, tmp_path / "of_objects", SMALL)
            monkeypatch.delenv(f"FASTMUM_ROOT_{name.upper()}")
        of_files, of_objects = (
            {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
            for name in ("of_files", "of_objects")
        )
        assert of_files == of_objects
        made = Manifest(tmp_path / "of_files/co3d.arrow")
        assert [len(made.present(column).nonzero()[0]) for column in ("depth", "side")] == [3, 2]
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

    def test_objects_that_are_cut_off_are_not_waited_for(self, s3, loose, monkeypatch, tmp_path):
        monkeypatch.setenv("FASTMUM_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(remote, "RETRY_S", 0.0)
        pack(loose, f"{s3}/cut", SMALL)
        file = Manifest(f"{s3}/cut/scenes.arrow").file(5)
        system, path = remote.file_system(file.place.store)
        for size in (file.place.offset + 10, file.place.offset - 1000, 0):
            system.pipe_file(path, system.cat_file(path)[:size])
            with pytest.raises(FrameError, match="cut off") as caught:
                read_file(file)
            assert not caught.value.transient
        remote.check(file.place.store)  # though it is empty

    def test_a_manifest_by_url_is_the_present_one_here_and_for_tasks(self, s3, loose, shards, tmp_path, monkeypatch):
        pytest.importorskip("aiohttp")
        monkeypatch.setenv("FASTMUM_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(remote, "FIRST_S", 0.01)
        remote.write(f"{s3}/lists/scenes.arrow", loose)
        system, _ = remote.file_system(s3)
        monkeypatch.setattr(system, "ukey", Mock(side_effect=[OSError(16, "503"), "version"]))
        assert Manifest(f"{s3}/lists/scenes.arrow").checksum == Manifest(loose).checksum
        given = []

        def noted(work, tasks, **options):
            given.extend(tasks)
            return spread(work, tasks, **options)

        monkeypatch.setattr("fastmum.data.pack.spread", noted)
        monkeypatch.setattr("fastmum.data.unpack.spread", noted)
        handler = partial(SimpleHTTPRequestHandler, directory=loose.parent)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}/scenes.arrow"
            assert pack(url, tmp_path / "of_url", SMALL) == unpack(url, tmp_path / "unpacked")
            assert {task.source.given for task in given} == {url}
            shutil.copy(shards, loose)
            assert Manifest(url).checksum == Manifest(shards).checksum
            server.shutdown()

    def test_wrong_names_and_credentials_are_one_line_before_the_run(self, s3, loose, tmp_path, monkeypatch):
        import s3fs

        def opened(root):
            config = load_config(None, [f"data.manifests=[{loose}]", f"data.roots.scenes={root}", "data.views=[2,4]"])
            return open_splits(config, tmp_path / "run")

        for root, reason in (
            ("s3://none", "bucket does not exist"), (f"{s3}/none", "key does not exist"), ("nope://x", "nope"),
        ):  # fmt: skip
            with pytest.raises(DataError, match=rf"^'{root}[^\n]*{reason}[^\n]*$"):
                opened(root)
        monkeypatch.setattr("fastmum.data.pack.spread", None)  # the output is tried before anything is packed
        with pytest.raises(DataError, match=r"^'s3://none/x[^\n]*bucket does not exist[^\n]*$"):
            pack(loose, "s3://none/x")
        assert not s3fs.S3FileSystem().exists("none")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("HOME", str(tmp_path))
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(DataError, match=r"^[^\n]*credentials[^\n]*$"):
            opened(f"{s3}/scenes")
        monkeypatch.setitem(sys.modules, "s3fs", None)
        s3fs.S3FileSystem.clear_instance_cache()


def test_servers_that_ignore_ranges_are_named(shards, monkeypatch):
    system = pytest.importorskip("fsspec").filesystem("memory")
    system.put(f"{shards.parent}/", "/whole", recursive=True)
    manifest, cat = Manifest(shards, {"scenes": "memory://whole"}), system.cat_file
    monkeypatch.setattr(system, "cat_file", lambda path, **_: cat(path))
    for row in (0, 1):
        with pytest.raises(FrameError, match="more than the range"):
            read_file(manifest.file(row))


def test_paths_of_stores_are_paths(tmp_path):
    url = StoredPath("s3://bucket/folder") / "a/b.jpg"
    assert (str(url), str(url.parent)) == ("s3://bucket/folder/a/b.jpg", "s3://bucket/folder/a")
    assert (url.name, url.suffix) == ("b.jpg", ".jpg")
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    file = StoredPath.at("/x/y.txt", Place(str(tmp_path / "a.bin")))
    for same in (file, pickle.loads(pickle.dumps(file))):
        assert (same.is_file(), same.is_dir(), same.read_text()) == (True, False, "0123456789")
        assert same.place == file.place
    assert not StoredPath("s3://bucket/x").exists()
