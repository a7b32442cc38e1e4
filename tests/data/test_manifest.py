"""Manifests: what is written is read back, cheaply, and a file is whole or not there."""

import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.manifest import Counts, Manifest, Manifests, SequenceRecord, _changes, write_manifest


def write(out, records, dataset="rooms", root="/data", **metadata):
    return write_manifest(out, records, dataset=dataset, root=root, metadata=metadata)


def numbered(name, n, **more):
    return SequenceRecord(name, [f"{name}/{i}.jpg" for i in range(n)], **more)


def poses(n, seed=0):
    full = np.tile(np.eye(4, dtype=np.float32), (n, 1, 1))
    full[:, :3] = np.random.default_rng(seed).normal(size=(n, 3, 4))
    return full


def test_rows_sequences_and_names(tmp_path):
    counts = write(tmp_path / "m.arrow", [numbered("a", 3), numbered("b/c", 2), SequenceRecord("top", ["x.png"])])
    assert counts == Counts(sequences=3, frames=6)
    manifest = Manifest.open(tmp_path / "m.arrow")
    assert (manifest.num_sequences, manifest.num_frames) == (3, 6)
    assert manifest.starts.tolist() == [0, 3, 5, 6]
    assert manifest.starts.dtype == np.int64
    assert manifest.datasets == ("rooms",)
    assert manifest.dataset_of.tolist() == [0, 0, 0]
    assert [manifest.sequence_name(i) for i in range(3)] == ["a", "b/c", "top"]
    assert [str(manifest.file(row)) for row in (0, 4, 5)] == ["/data/a/0.jpg", "/data/b/c/1.jpg", "/data/x.png"]
    assert manifest.files([4, 0]) == [manifest.file(4), manifest.file(0)]
    assert manifest.sequence_of(np.array([0, 2, 3, 5])).tolist() == [0, 0, 1, 2]
    assert manifest.camera_arrays(0)[1] is None
    assert manifest.camera_arrays(0)[0] is None


def test_poses_and_intrinsics_where_they_are_known(tmp_path):
    pose, focal = poses(3), np.arange(12, dtype=np.float32).reshape(3, 4)
    pose[1, 0, 0] = np.nan
    records = [
        numbered("none", 2),
        numbered("both", 3, poses=pose, intrinsics=focal),
        numbered("one", 1, intrinsics=focal[:1]),
    ]
    write(tmp_path / "m.arrow", records)
    manifest = Manifest.open(tmp_path / "m.arrow")
    assert [manifest.camera_arrays(row)[1] is not None for row in range(6)] == [False, False, True, False, True, False]
    assert np.array_equal(manifest.camera_arrays(4)[1], pose[2])
    assert [manifest.camera_arrays(row)[0] is not None for row in range(6)] == [False, False, True, True, True, True]
    assert np.array_equal(manifest.camera_arrays(3)[0], focal[1])
    assert manifest.camera_arrays(4)[1].dtype == manifest.camera_arrays(3)[0].dtype == np.float32


def test_depth_and_masks_where_frames_have_them(tmp_path):
    millimetres, rays = DepthFormat("png16", 1e-3, unknown=65535.0), DepthFormat("hdf5", kind="ray", max=100.0)
    records = [
        numbered("none", 2),
        numbered(
            "some", 3, depths=["some/d/0.png", "", "some/d/2.png"], masks=["", "m/1.png", ""], depth_format=millimetres
        ),
        numbered("scaled", 2, depths=["d.h5", "e.h5"], depth_format=rays, depth_units=np.array([0.1, 0.7])),
        numbered("last", 1),
    ]
    for name in ("m.arrow", "again"):
        write(tmp_path / name, records)
    assert (tmp_path / "m.arrow").read_bytes() == (tmp_path / "again").read_bytes()
    manifest = Manifest.open(tmp_path / "m.arrow")
    assert manifest.known == {"pose": 0, "intrinsics": 0, "depth": 4, "mask": 1}
    assert [manifest.depth_file(row) and manifest.depth_file(row)[0].as_posix() for row in range(8)] == [
        None, None, "/data/some/d/0.png", None, "/data/some/d/2.png", "/data/d.h5", "/data/e.h5", None,
    ]  # fmt: skip
    assert manifest.depth_file(4)[1] == millimetres
    assert [manifest.depth_file(row)[1] for row in (5, 6)] == [rays._replace(unit=0.1), rays._replace(unit=0.7)]
    assert [row for row in range(8) if manifest.mask_file(row)] == [3]
    assert {folder.as_posix(): names for folder, names in manifest.folders("depth")} == {
        "/data/some/d": ["0.png", "2.png"], "/data": ["d.h5", "e.h5"],
    }  # fmt: skip
    both = Manifests([tmp_path / "m.arrow", tmp_path / "again"])
    assert both.depth_file(8 + 6) == manifest.depth_file(6)
    assert both.mask_file(8 + 3) == manifest.mask_file(3) == Path("/data/m/1.png")
    assert both.camera_arrays(8) == (None, None)
    pa.ipc.open_file(tmp_path / "m.arrow").read_all().validate(full=True)


def test_anyone_can_read_the_file_with_arrow(tmp_path):
    write(tmp_path / "m.arrow", [numbered("a", 2, poses=poses(2), intrinsics=np.ones((2, 4)))], rule="paper", seed=3)
    table = pa.ipc.open_file(tmp_path / "m.arrow").read_all()
    table.validate(full=True)
    assert table.column_names == ["dataset", "sequence", "path", "pose", "intrinsics"]
    assert table["sequence"].to_pylist() == ["a", "a"]
    assert table["path"].to_pylist()[1] == {"folder": "a", "file": "1.jpg"}
    assert all(pa.types.is_dictionary(field.type) for field in table.schema.field("path").type)
    assert table["pose"].type == pa.list_(pa.float32(), 12)
    assert Manifest.open(tmp_path / "m.arrow").metadata == {
        "rule": "paper", "seed": 3, "root": "/data", "counts": {"sequences": 1, "frames": 2},
    }  # fmt: skip


def test_two_runs_give_identical_bytes(tmp_path):
    records = [numbered("a", 3), numbered("b", 2, poses=poses(2), intrinsics=np.ones((2, 4)))]
    for name in ("1", "2"):
        write(tmp_path / name, iter(records), rule="paper", options={"b": 1, "a": 2})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("before", [None, b"an older manifest"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError])
def test_an_interrupted_build_leaves_what_was_there(tmp_path, before, error):
    out = tmp_path / "m.arrow"
    if before:
        out.write_bytes(before)

    def records():
        yield numbered("a", 3, poses=poses(3))
        assert [p.name for p in tmp_path.iterdir()] == (["m.arrow"] if before else [])
        raise error

    with pytest.raises(error):
        write(out, records())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"m.arrow": before} if before else {})


def test_a_failure_while_the_file_is_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastmum.data.manifest_writer.os.fsync", full)
    with pytest.raises(DataError, match=r"m.arrow' cannot be written \(No space left on device\)"):
        write(tmp_path / "m.arrow", [numbered("a", 3)])
    assert not list(tmp_path.iterdir())


def test_a_relative_root_starts_at_the_manifest(tmp_path):
    write(tmp_path / "m.arrow", [numbered("a", 1)], root="frames")
    assert Manifest.open(tmp_path / "m.arrow").file(0) == tmp_path / "frames/a/0.jpg"


def test_manifests_are_pickled_as_paths(tmp_path):
    write(tmp_path / "m.arrow", [numbered("a", 500)])
    for opened in (Manifest.open(tmp_path / "m.arrow"), Manifests([tmp_path / "m.arrow"])):
        sent = pickle.dumps(opened)
        assert len(sent) < 400
        assert pickle.loads(sent).file(499) == opened.file(499)


def test_several_manifests_are_one_behind_another(tmp_path):
    write(tmp_path / "1", [numbered("a", 3), numbered("b", 2)], dataset="rooms", root="/one")
    write(tmp_path / "2", [numbered("a", 1), numbered("c", 4, dataset="rooms", poses=poses(4))], "streets", "/two")
    both = Manifests([tmp_path / "1", str(tmp_path / "2")])
    assert (both.num_sequences, both.num_frames) == (4, 10)
    assert both.starts.tolist() == [0, 3, 5, 6, 10]
    assert both.datasets == ("rooms", "streets")
    assert both.dataset_of.tolist() == [0, 0, 1, 0]
    assert [both.sequence_name(i) for i in range(4)] == ["a", "b", "a", "c"]
    assert [str(file) for file in both.files(np.array([9, 0, 5]))] == ["/two/c/3.jpg", "/one/a/0.jpg", "/two/a/0.jpg"]
    assert both.file(4) == both.files([4])[0]
    assert both.sequence_of(np.arange(10)).tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]
    assert both.camera_arrays(4)[1] is None
    assert np.array_equal(both.camera_arrays(8)[1], poses(4)[2])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 17))
def test_starts_are_found_whatever_the_lengths(lengths, block):
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    assert _changes(numbers, block).tolist() == np.cumsum([0, *lengths])[:-1].tolist()


def test_neighbours_of_one_name_in_two_data_sets_stay_apart(tmp_path):
    write(tmp_path / "m", [numbered("a", 2), numbered("a", 2, dataset="other")])
    assert Manifest.open(tmp_path / "m").starts.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "there is no sequence to write"),
        ([numbered("a", 0)], "sequence 'a' of rooms has no frames"),
        ([SequenceRecord("", ["a.jpg"])], "has no name"),
        ([numbered("a", 1), numbered("a", 2)], "sequence 'a' of rooms appears twice"),
        ([SequenceRecord("a", ["/etc/x.jpg"])], "'/etc/x.jpg', which is not a path below the root"),
        ([SequenceRecord("a", ["../x.jpg"])], "'../x.jpg', which is not a path below the root"),
        ([SequenceRecord("a", ["b/"])], "'b/', which is not a path below the root"),
        ([SequenceRecord("a", ["\udcff.jpg"])], "is not UTF-8"),
        ([numbered("a", 2, poses=poses(3))], r"poses? of shape \(3, 4, 4\), but must have \(2, 4, 4\)"),
        (
            [numbered("a", 2, depths=["d.png", "../e.png"], depth_format=DepthFormat("png16"))],
            "'../e.png', which is not",
        ),
        ([numbered("a", 2, masks=["m.png"])], "1 mask paths for 2 frames"),
        ([numbered("a", 1, depths=["d.png"])], "no depth_format"),
        ([numbered("a", 2, intrinsics=np.ones((2, 3)))], r"intrinsics of shape \(2, 3\)"),
    ],
)
def test_a_sequence_that_is_not_well_formed_is_named(tmp_path, records, message):
    with pytest.raises(DataError, match=message) as caught:
        write(tmp_path / "m", records)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_opened_is_one_line_with_a_remedy(tmp_path, monkeypatch):
    write(tmp_path / "m.arrow", [numbered("a", 200)])
    whole = (tmp_path / "m.arrow").read_bytes()
    (tmp_path / "short").write_bytes(whole[:-40])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("not arrow\n" * 100)
    with monkeypatch.context() as newer:
        newer.setattr("fastmum.data.manifest_writer.VERSION", 9)
        write(tmp_path / "newer", [numbered("a", 200)])
    pa.ipc.new_file(tmp_path / "other", pa.schema([("a", pa.int8())])).close()
    for name, message in {
        "nowhere": "there is no manifest",
        "short": "is not a manifest, or is truncated",
        "empty": "is not a manifest",
        "text": "is not a manifest",
        "other": "is not a manifest",
        "newer": "has version 9, but this fastmum reads 1",
        ".": "cannot be read",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            Manifest.open(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no manifest was given"):
        Manifests([])
    with pytest.raises(DataError, match=r"cannot be written \(No such file"):
        write(tmp_path / "no/folder/m.arrow", [numbered("a", 1)])


def million(unique_names):
    for s in range(10_000):
        stem = f"{s}_" if unique_names else ""
        yield SequenceRecord(f"scene_{s:06d}", [f"scene_{s:06d}/rgb/{stem}{i:05d}.jpg" for i in range(100)])


@pytest.mark.parametrize("unique_names", [False, True])
def test_opening_allocates_a_few_bytes_a_sequence_not_a_frame(tmp_path, unique_names):
    """A million frames; the 20 million of the paper are in the benchmarks."""
    assert write(tmp_path / "m.arrow", million(unique_names)).frames == 1_000_000
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        manifest = Manifest.open(tmp_path / "m.arrow")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 20 * manifest.num_sequences
    assert peak < 40 * manifest.num_sequences + (8 << 20)
    assert pa.total_allocated_bytes() - arrow < 1 << 16, "Arrow maps the columns, it does not read them"
    assert manifest.file(999_999).name == ("9999_00099.jpg" if unique_names else "00099.jpg")


MEMORY = """
import sys
from fastmum.data.manifest import Manifest
manifest = Manifest.open(sys.argv[1])
lines = dict(line.split(":") for line in open("/proc/self/status"))
print(manifest.num_frames, *(int(lines[key].split()[0]) // 1000 for key in ("VmHWM", "RssAnon")))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twenty_million_frames_take_less_than_200_mb(tmp_path):
    """Of a fresh process, the interpreter and Arrow included; all but the private part is shared by processes."""
    names = [f"{i:05d}.jpg" for i in range(100)]
    scenes = (SequenceRecord(f"s{s}", [f"scene_{s:06d}/rgb/{name}" for name in names]) for s in range(200_000))
    write(tmp_path / "m.arrow", scenes)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "m.arrow")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    frames, peak, private = map(int, out.split())
    assert frames == 20_000_000
    assert peak <= 200
    assert private <= 60
