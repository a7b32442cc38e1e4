"""Frames from shards equal those of loose files; damage is never another image."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stored import SMALL, batches, contents

from fastmum.data import store
from fastmum.data.build import build
from fastmum.data.build import main as build_command
from fastmum.data.decode.image import FrameError, read_file
from fastmum.data.errors import DataError
from fastmum.data.inspect import main as inspect
from fastmum.data.manifest import Manifest, Manifests, SequenceRecord, write_manifest
from fastmum.data.pack import Settings, pack
from fastmum.data.pack import main as pack_command
from fastmum.data.unpack import main as unpack_command
from fastmum.data.unpack import unpack


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

    def test_equal_bytes_for_any_number_of_workers_and_after_an_interruption(self, loose, shards, tmp_path, caplog):
        out = tmp_path / "again"
        pack(loose, out, SMALL, workers=2)
        files = {file.name: file.read_bytes() for file in shards.parent.iterdir()}
        assert {file.name: file.read_bytes() for file in out.iterdir()} == files
        kept = out / "scenes-000000.tar"
        time = kept.stat().st_mtime_ns
        (out / "scenes.arrow").unlink()
        (out / "scenes-000001.index").unlink()
        (out / ".partial-1-scenes-000001.tar").write_bytes(b"left by a kill")
        (out / "scenes-000099.tar").write_bytes(b"of an earlier call with smaller shards")
        assert "earlier calls" not in caplog.text
        pack(loose, out, SMALL)
        assert ".partial-1-scenes-000001.tar, scenes-000099.tar" in caplog.text
        assert kept.stat().st_mtime_ns == time
        assert {name: (out / name).read_bytes() for name in files} == files

    def test_unpack_is_the_inverse(self, image_folder, loose, shards, tmp_path):
        unpack(shards, tmp_path / "out", workers=2)
        manifest = Manifest(tmp_path / "out/scenes.arrow")
        assert contents(manifest) == contents(Manifest(loose))
        assert [manifest.paths("path", np.arange(24))] == [Manifest(loose).paths("path", np.arange(24))]
        shutil.move(tmp_path / "out", tmp_path / "moved")  # files and manifest move together
        assert contents(Manifest(tmp_path / "moved/scenes.arrow")) == contents(Manifest(loose))

    def test_unpack_never_replaces_a_file(self, tmp_path, refusal):
        """Two data sets whose files have equal paths and sizes."""
        for name in "ab":
            (tmp_path / name).mkdir()
            image = Image.fromarray(np.full((8, 8, 3), ord(name), np.uint8))
            for i in range(3):
                image.save(tmp_path / name / f"{i}.bmp")
            build("folder", tmp_path / name, tmp_path / f"lists/{name}.arrow")
        words = tmp_path / "lists/a.arrow", tmp_path / "lists/b.arrow", "--out", tmp_path / "out", "--workers", 0
        assert "another --out" in refusal(unpack_command, *words)
        right = contents(Manifest(tmp_path / "lists/a.arrow"))
        assert contents(Manifest(tmp_path / "out/a.arrow")) == right
        assert not (tmp_path / "out/b.arrow").exists()
        assert unpack(tmp_path / "lists/a.arrow", tmp_path / "out").frames == 3  # equal files are kept
        assert "same name" in refusal(unpack_command, words[0], tmp_path / "a.arrow", *words[2:])

    @pytest.mark.parametrize("command", [build_command, unpack_command])
    def test_commands_that_write_files_refuse_urls(self, command, loose, image_folder, tmp_path, refusal, monkeypatch):
        monkeypatch.chdir(tmp_path)  # where a folder `s3:` would be made
        words = [loose] if command is unpack_command else ["folder", "--root", image_folder]
        assert "s3://bucket/x.arrow" in refusal(command, *words, "--out", "s3://bucket/x.arrow")
        assert not list(tmp_path.glob("s3:*"))

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
        sizes = [Image.open(io.BytesIO(data)).size for data in contents(made)]
        assert sizes == [(20, 40)] * 3 + [(16, 12)] + [(20, 40)] * 2
        assert made.camera_arrays(0)[0].tolist() == [25, 30, 10, 20]
        assert made.camera_arrays(3)[0].tolist() == [9, 9, 8, 6]
        assert made.camera_arrays(4) == (None, None)
        assert [made.file(i).place for i in (4, 5)] == [made.file(i).place for i in (2, 0)]
        assert made.scene_names(np.arange(2)) == ["a.b/c", "a.b/c"]
        with tarfile.open(tmp_path / "out/m-000000.tar") as tar:
            assert tar.getnames()[:3] == ["d/a.b/c/000000.jpg", "d/a.b/c/000000.json", "d/a.b/c/000001.jpg"]
            assert json.load(tar.extractfile("d/a.b/c/000000.json")) == {"intrinsics": [25.0, 30.0, 10.0, 20.0]}

    def test_what_cannot_be_read_stops_or_is_skipped(self, image_folder, loose, tmp_path, refusal, caplog, monkeypatch):
        bad = sorted(image_folder.glob("scene1/*"))[2]
        bad.write_bytes(bad.read_bytes()[:100])
        assert f"{bad}' cannot be packed" in refusal(pack_command, loose, "--out", tmp_path / "o", "--workers", 0)
        assert "would be replaced" in refusal(pack_command, loose, "--out", loose.parent)
        assert "shard-gb" in refusal(pack_command, loose, "--out", tmp_path / "o", "--shard-gb", 0)
        skip = SMALL._replace(broken="skip")
        assert pack(loose, tmp_path / "o", skip).frames == 23
        assert "1 images were skipped" in caplog.text
        bad.unlink()
        assert pack(loose, tmp_path / "o", skip).frames == 23
        assert f"{bad}' cannot be packed (missing)" in refusal(pack_command, loose, "--out", tmp_path / "o")
        Image.new("RGB", (8, 8)).save(bad)
        assert pack(loose, tmp_path / "o", SMALL).frames == 24

        def failing(file):
            if file.name == bad.name:
                raise FrameError("503", transient=True)
            return read_file(file)

        monkeypatch.setattr("fastmum.data.pack.read_file", failing)
        with pytest.raises(DataError, match=r"503.*goes on"):
            pack(loose, tmp_path / "o2", skip)


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

    def test_depth_masks_are_checked_and_an_index_must_be_there(self, masked, tmp_path, capsys):
        pack(masked, tmp_path / "shards")
        made = tmp_path / "shards/co3d.arrow"
        assert self.damaged(made, capsys) == (0, [])
        tar = tmp_path / "shards/co3d-000000.tar"
        content, end = tar.read_bytes(), Manifest(made).column_files("side", np.array([1]))[0].place
        end = end.offset + end.length - 1
        tar.write_bytes(content[:end] + b"?" + content[end + 1 :])
        code, (line,) = self.damaged(made, capsys)
        assert (code, "depth_masks/1.png' has another checksum" in line) == (1, True)
        tar.with_suffix(".index").unlink()
        code, lines = self.damaged(made, capsys)
        assert (code, len(lines)) == (1, 3)  # of images, depth maps and masks
        assert all("co3d-000000.index' is missing" in line for line in lines)

    def test_loose_files_among_archives_are_checked(self, shards, image_folder, capsys):
        (folder := shards.parent / "extra").mkdir()
        loose = shutil.copy(image_folder / "scene0/1.png", folder)
        place = Manifest(shards).file(0).place
        places = {"path": [place._replace(store=os.path.basename(place.store)), None]}
        record = SequenceRecord("mixed", ["scene0/0.png", "extra/1.png"], places=places)
        write_manifest(mixed := shards.with_name("mixed.arrow"), [record], dataset="d", root=Path("."), metadata={})
        assert self.damaged(mixed, capsys) == (0, [])
        os.unlink(loose)
        code, (line,) = self.damaged(mixed, capsys)
        assert (code, "extra/1.png': No such file" in line) == (1, True)

    def test_a_run_stops_with_one_line(self, shards):
        for tar in shards.parent.glob("*.tar"):
            tar.write_bytes(tar.read_bytes()[:1000])
        store._handles.clear()
        with pytest.raises(DataError, match=r"^[^\n]*cannot be decoded[^\n]*$"):
            batches(Manifests([shards]))
