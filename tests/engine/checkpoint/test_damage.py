"""Truncated files and flipped bits: a damaged checkpoint is not loaded, the one before it is."""

import dataclasses
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from states import CONFIG, VALUES, assert_newest, full_state

from fastmum.engine.checkpoint import (
    CheckpointError,
    Checkpoints,
    find_checkpoints,
    load_checkpoint,
    load_newest,
    read_weights,
)
from fastmum.engine.checkpoint.manifest import FileHash, TensorSpec

FILES = ("__0_0.distcp", ".metadata", "checkpoint.json")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    writer = Checkpoints(folder, keep=2)
    for step in (1, 2):
        writer.save(step, full_state(step), VALUES)
    writer.close()
    return folder


DAMAGES = {
    "cut": lambda data, position, bit: data[:position],
    "flip": lambda data, position, bit: data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :],
    "extend": lambda data, position, bit: data + data[position : position + 1 + bit],
}


def damage(file, kind, place, bit):
    data = file.read_bytes()
    file.write_bytes(DAMAGES[kind](data, int(place * len(data)), bit))


@given(
    name=st.sampled_from(FILES),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    kind=st.sampled_from(sorted(DAMAGES)),
)
@settings(max_examples=60, deadline=None)
def test_any_damage_falls_back_to_the_one_before(two, name, place, bit, kind):
    with tempfile.TemporaryDirectory() as copy:
        folder = shutil.copytree(two, Path(copy) / "checkpoints")
        damage(folder / "step_0000002" / name, kind, place, bit)
        assert assert_newest(folder, 1).step == 1


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(two, tmp_path, name, caplog):
    folder = shutil.copytree(two, tmp_path / "copy")
    (folder / "step_0000002" / name).unlink()
    assert assert_newest(folder, 1).step == 1
    assert "step_0000002'" in caplog.text
    assert name in caplog.text


def test_nothing_readable_is_an_error(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "copy")
    for step in (1, 2):
        (folder / f"step_000000{step}/__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"train.resume=never"):
        load_newest(folder, full_state(9), CONFIG)
    with pytest.raises(CheckpointError, match=r"step_0000002' .*__0_0.distcp"):
        load_checkpoint(folder / "step_0000002", full_state(9), CONFIG)


def test_another_format_is_named(two, monkeypatch):
    monkeypatch.setattr("fastmum.engine.checkpoint.manifest.FORMAT", 99)
    assert "reads 99" in find_checkpoints(two)[0].problem


class Hostile:
    """Its pickle calls a function."""

    def __init__(self, call, *words):
        self.reduced = call, words

    def __reduce__(self):
        return self.reduced


def rewrite(folder, **changes):
    """Write the manifest again, with the right hash."""
    manifest = find_checkpoints(folder)[0].manifest
    dataclasses.replace(manifest, **{name: change(getattr(manifest, name)) for name, change in changes.items()}).write()


def write_metadata(folder, content):
    """The hash is right: whoever writes the pickle can write the manifest, too."""
    (folder / ".metadata").write_bytes(content)
    file = FileHash(len(content), xxhash.xxh3_128_hexdigest(content))
    rewrite(folder, files=lambda files: files | {".metadata": file})


def test_metadata_with_huge_numbers_take_no_memory(two, tmp_path):
    """LONG_BINPUT of 4 billion: the unpickler of C would clear a table of 64 GB."""
    folder = shutil.copytree(two / "step_0000002", tmp_path / "copy")
    write_metadata(folder, b"\x80\x02Nr\xf0\xff\xff\xff.")
    with pytest.raises(CheckpointError, match="copy"):
        read_weights(folder)


@pytest.mark.parametrize("call", [os.mkdir, exec, pickle.loads, shutil.rmtree])
def test_metadata_of_others_run_no_code(two, tmp_path, call):
    folder, mark = shutil.copytree(two / "step_0000002", tmp_path / "copy"), tmp_path / "mark"
    words = {os.mkdir: mark, exec: f"open({str(mark)!r}, 'w')", pickle.loads: b"", shutil.rmtree: tmp_path}
    write_metadata(folder, pickle.dumps(Hostile(call, words[call])))
    for read in (lambda: read_weights(folder), lambda: load_newest(folder, full_state(9), CONFIG)):
        with pytest.raises(CheckpointError, match=rf"copy' .*{call.__name__}"):
            read()
    assert folder.exists()
    assert not mark.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": lambda tensors: tensors | {"model.huge": TensorSpec((1 << 40, 1 << 20), "float32")}},
        {"tensors": lambda tensors: tensors | {"model.odd": TensorSpec((1,), "load")}},
        {"tensors": lambda tensors: tensors | {"model.odd": TensorSpec((-1, 4), "float32")}},
        {"files": lambda files: files | {"../../etc/passwd": FileHash(3, "")}},
        {"files": lambda files: {}},
        {"files": lambda files: {name: file for name, file in files.items() if name != ".metadata"}},  # a pipe, say
        {"step": lambda step: -1},
        {"values": lambda values: {}},
    ],
)
def test_sizes_and_names_in_manifests_are_checked_before_anything_is_read(two, tmp_path, changes):
    folder = shutil.copytree(two / "step_0000002", tmp_path / "copy")
    rewrite(folder, **changes)
    assert "checkpoint.json: is damaged" in find_checkpoints(folder)[0].problem
    with pytest.raises(CheckpointError, match="copy"):
        read_weights(folder)


def test_a_checkpoint_is_published_when_all_its_files_are_there(tmp_path, monkeypatch):
    """Not if the processes write into folders that rank 0 does not see."""
    from fastmum.engine.checkpoint import writer

    write = writer.write_shards
    for break_it in (lambda file: file.unlink(), lambda file: file.write_bytes(b"short")):

        def broken(path, *args, break_it=break_it):
            files = write(path, *args)
            break_it(path / "__0_0.distcp")
            return files

        monkeypatch.setattr(writer, "write_shards", broken)
        checkpoints = Checkpoints(tmp_path, keep=2)
        checkpoints.save(1, full_state(1), VALUES)
        with pytest.raises(CheckpointError, match=r"step_0000001.*__0_0.distcp"):
            checkpoints.wait()
        assert list(tmp_path.iterdir()) == []
