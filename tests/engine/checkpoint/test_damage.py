"""Truncated files and flipped bits: a damaged checkpoint is not loaded, the one before it is."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from states import CONFIG, VALUES, assert_newest, full_state

from fastmum.engine.checkpoint import CheckpointError, Checkpoints, find_checkpoints, load_checkpoint, load_newest

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
