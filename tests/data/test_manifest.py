"""Manifests: what is written is read back, cheaply, and a file is whole or absent."""

import pickle
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.manifest import Counts, Manifest, Manifests, SequenceRecord, write_manifest
from fastmum.data.manifest_columns import changes
from fastmum.data.manifest_writer import TEXT, _write
from fastmum.data.store import Place, StoredPath

MILLIMETRES = DepthFormat("png16", 1e-3, unknown=65535.0)
RAYS = DepthFormat("hdf5", kind="ray", max=100.0)


def write(out, records, dataset="rooms", root="/data", **metadata):
    return write_manifest(out, records, dataset=dataset, root=root, metadata=metadata)


def numbered(name, n, **more):
    return SequenceRecord(name, [f"{name}/{i}.jpg" for i in range(n)], **more)


def poses(n):
    full = np.tile(np.eye(4, dtype=np.float32), (n, 1, 1))
    full[:, :3] = np.random.default_rng(0).normal(size=(n, 3, 4))
    return full


def test_rows_sequences_and_names(tmp_path):
    """Of one file and of two: neighbours of one name in two data sets are two sequences."""
    unknown = SequenceRecord("top", ["x.png"], np.full((1, 4, 4), np.nan), np.full((1, 4), np.nan), masks=[""])
    assert write(tmp_path / "1", [numbered("a", 3), numbered("b/c", 2), unknown]) == Counts(sequences=3, frames=6)
    write(tmp_path / "2", [numbered("a", 1), numbered("a", 4, dataset="rooms", poses=poses(4))], "streets", "/two")
    one, both = Manifest.open(tmp_path / "1"), Manifests([tmp_path / "1", str(tmp_path / "2")])
    assert (one.num_sequences, one.num_frames, both.num_sequences, both.num_frames) == (3, 6, 5, 11)
    assert (one.datasets, both.datasets) == (("rooms",), ("rooms", "streets"))
    files = ["/data/b/c/1.jpg", "/data/a/0.jpg", "/data/x.png", "/two/a/0.jpg", "/two/a/3.jpg"]
    for manifest, n in ((one, 3), (both, 5)):
        assert manifest.starts.tolist() == [0, 3, 5, 6, 7, 11][: n + 1]
        assert manifest.starts.dtype == np.int64
        assert manifest.dataset_of.tolist() == [0, 0, 0, 1, 0][:n]
        assert [manifest.sequence_name(i) for i in range(n)] == ["a", "b/c", "top", "a", "a"][:n]
        assert [str(file) for file in manifest.files(np.array([4, 0, 5, 6, 10][:n]))] == files[:n]
        assert manifest.file(4) == manifest.files([4])[0]
        sequences = [0, 0, 0, 1, 1, 2, 3, 4, 4, 4, 4][: manifest.num_frames]
        assert manifest.sequence_of(np.arange(manifest.num_frames)).tolist() == sequences
        assert manifest.camera_arrays(0) == (None, None)
        assert manifest.depth_file(0) is manifest.mask_file(0) is None
    assert np.array_equal(both.camera_arrays(9)[1], poses(4)[2])
    assert set(one.known.values()) == {0}
    assert pa.ipc.open_file(tmp_path / "1").schema.names == ["dataset", "sequence", "path"]


def test_cameras_depth_and_masks_where_they_are_known(tmp_path):
    """All optional columns, each beginning after rows that lack it."""
    pose, intrinsics = poses(3), np.arange(12.0).reshape(3, 4)
    pose[1, 0, 0] = np.nan
    records = [
        numbered("none", 2),
        numbered("some", 3, poses=pose, intrinsics=intrinsics),
        numbered("maps", 3, depths=["a/d/0.png", "", "a/d/2.png"], masks=["", "m/1.png", ""], depth_format=MILLIMETRES),
        numbered("scaled", 2, depths=["d.h5", "e.h5"], depth_format=RAYS, depth_units=np.array([0.1, 0.7])),
        numbered("last", 1),
    ]
    write(tmp_path / "m.arrow", records, rule="paper", seed=3)
    manifest = Manifest(tmp_path / "m.arrow")
    found_intrinsics, found_poses = zip(*map(manifest.camera_arrays, range(11)), strict=True)
    assert [row for row, found in enumerate(found_intrinsics) if found is not None] == [2, 3, 4]
    assert [row for row, found in enumerate(found_poses) if found is not None] == [2, 4]
    assert np.array_equal(found_poses[4], pose[2])
    assert found_intrinsics[4].tolist() == [8, 9, 10, 11]
    assert found_poses[4].dtype == found_intrinsics[4].dtype == np.float32
    assert manifest.known == {"pose": 2, "intrinsics": 3, "depth": 4, "mask": 1}
    found = {row: manifest.depth_file(row) for row in range(11) if manifest.depth_file(row)}
    assert found == {
        5: (Path("/data/a/d/0.png"), MILLIMETRES), 7: (Path("/data/a/d/2.png"), MILLIMETRES),
        8: (Path("/data/d.h5"), RAYS._replace(unit=0.1)), 9: (Path("/data/e.h5"), RAYS._replace(unit=0.7)),
    }  # fmt: skip
    assert [row for row in range(11) if manifest.mask_file(row)] == [6]
    folders = {folder.as_posix(): names for folder, names in manifest.folders("depth")}
    assert folders == {"/data/a/d": ["0.png", "2.png"], "/data": ["d.h5", "e.h5"]}
    both = Manifests([tmp_path / "m.arrow", tmp_path / "m.arrow"])
    assert both.depth_file(11 + 9) == found[9]
    assert both.mask_file(11 + 6) == manifest.mask_file(6) == Path("/data/m/1.png")
    counts = {"sequences": 5, "frames": 11}
    assert manifest.metadata == {"rule": "paper", "seed": 3, "root": "/data", "counts": counts}

    # Anyone can read the file with Arrow.
    table = pa.ipc.open_file(tmp_path / "m.arrow").read_all()
    table.validate(full=True)
    assert table.column_names == ["dataset", "sequence", "path", "pose", "intrinsics", "depth", "mask"]
    assert table["sequence"].to_pylist()[:3] == ["none", "none", "some"]
    assert table["path"].to_pylist()[1] == {"folder": "none", "file": "1.jpg"}
    assert all(pa.types.is_dictionary(field.type) for field in table.schema.field("path").type)
    assert table["pose"].type == pa.list_(pa.float32(), 12)
    assert {"folder": "", "file": "e.h5", "unit": 0.7}.items() <= table["depth"].to_pylist()[9].items()


def test_scenes_are_those_that_are_named_or_else_the_sequences(tmp_path):
    walk = numbered("walk", 5)
    chunks = [walk.select(range(3), "walk/0"), walk.select(range(3, 5), "walk/1")]
    write(tmp_path / "1", [numbered("a", 2), *chunks, chunks[0]._replace(name="turn", scene="hall")])
    write(tmp_path / "2", [numbered("a", 1), numbered("b", 1)], "streets")
    both = Manifests([tmp_path / "2", tmp_path / "1"])
    assert both.scene_names(np.array([5, 1, 2, 4, 3])) == ["hall", "b", "a", "walk", "walk"]
    assert both.parts[1].scene_names(np.arange(4)) == ["a", "walk", "walk", "hall"]
    assert "scene" not in pa.ipc.open_file(tmp_path / "2").schema.names


@pytest.mark.parametrize("archives", [False, True])
def test_a_flipped_bit_is_one_error(tmp_path, archives):
    maps = {"depths": ["d.png", ""], "masks": ["", "m.png"], "depth_format": MILLIMETRES}
    cameras = numbered("a", 2, poses=poses(2), intrinsics=np.ones((2, 4)), **maps)
    if archives:
        places = [Place("a.tar", 512, 1000, 2**32 - 1), Place("b.zip", 2**40, 5, 7, deflated=True)]
        cameras = cameras._replace(places={"path": places, "depth": [None, None], "mask": [None, places[1]]})
    write(tmp_path / "m.arrow", [cameras, *(cameras.select([i], f"a/{i}") for i in range(2))], rule="paper")
    whole = (tmp_path / "m.arrow").read_bytes()
    bits = {*range(128), *range(8 * len(whole) - 128, 8 * len(whole)), *range(128, 8 * len(whole), 137)}
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "d.arrow").write_bytes(damaged)
        with pytest.raises(DataError, match=rf"^[^\n]*{tmp_path}/d.arrow[^\n]*$"):
            Manifest(tmp_path / "d.arrow").files([0])  # blocks of rows are checked when they are used


def test_places_in_archives_are_read_back(tmp_path):
    places = [Place("a.tar", 512 + i, 1000 + i, 2**32 - 1 - i, size=1000 + i) for i in range(3000)]
    some = [*places[:2], Place("z/b.zip", 2**40, 5, 7, deflated=True), None]
    records = [
        numbered("loose", 2),
        numbered("some", 4, places={"path": some}),
        numbered("some", 3000, dataset="other"),
    ]
    write(tmp_path / "m.arrow", [*records[:2], records[2]._replace(places={"path": places})], root="raw")
    manifest = Manifest(tmp_path / "m.arrow")
    assert manifest.starts.tolist() == [0, 2, 6, 3006]
    assert (manifest.datasets, manifest.dataset_of.tolist()) == (("rooms", "other"), [0, 0, 1])
    assert [manifest.sequence_name(i) for i in range(3)] == ["loose", "some", "some"]
    found = [*manifest.places("path", np.arange(6)), *manifest.places("path", np.array([3005, 6]))]
    stores = [tmp_path / "raw/a.tar", tmp_path / "raw/z/b.zip"]
    expected = [None, None, *places[:2], some[2]._replace(store=stores[1]), None, places[2999], places[0]]
    assert found == [place and place._replace(store=str(stores["b.zip" in str(place.store)])) for place in expected]
    assert [type(file) is StoredPath for file in manifest.files([0, 2, 5])] == [False, True, False]
    assert str(manifest.file(3005)) == f"{tmp_path}/raw/some/2999.jpg"
    table = pa.ipc.open_file(tmp_path / "m.arrow").read_all()  # anyone can read it with Arrow
    table.validate(full=True)
    assert table["sequence"].slice(2, 1).to_pylist() == ["some"]
    assert table["path_place"].to_pylist()[3] == {"offset": 513, "length": 1001, "check": 2**32 - 2}


def test_numbers_outside_their_dictionaries_and_other_columns_are_refused(tmp_path):
    """Whatever the checksum: such files would end the process when they are read."""
    whole = {"dataset": ([0, 0], np.int16), "sequence": ([0, 1], np.int32), "folder": ([0, 0], np.int32)}
    good = {name: np.array(*column) for name, column in whole.items()} | {"file": np.array([0, 0], np.int32)}

    def write_numbers(metadata='{"root": "/"}', drop="", **numbers):
        texts = {name: ["x"] for name in good} | {"sequence": ["x", "y"]}
        column = {
            name: pa.DictionaryArray.from_arrays(pa.array(rows), pa.array(texts[name], TEXT), safe=False)
            for name, rows in (good | numbers).items()
        }
        column["path"] = pa.StructArray.from_arrays([column.pop("folder"), column.pop("file")], ["folder", "file"])
        column.pop(drop, None)
        _write(tmp_path / "m", pa.RecordBatch.from_pydict(column), metadata)
        return Manifest(tmp_path / "m")

    assert write_numbers().num_sequences == 2
    for name, numbers in (("file", [0, 1]), ("folder", [-1, 0]), ("dataset", [0, 9]), ("sequence", [0, 2]),
                          ("sequence", [1, 0]), ("sequence", [0, 0]), ("file", [0, 1 << 30])):  # fmt: skip
        with pytest.raises(DataError, match=rf"^'{tmp_path}/m' is not a manifest[^\n]*$"):
            write_numbers(**{name: np.array(numbers, good[name].dtype)})
    for broken in ({"metadata": "[]"}, {"metadata": "{"}, {"metadata": "{}"}, {"drop": "path"}, {"drop": "dataset"},
                   {"file": np.array([0, 0], np.int16)}):  # fmt: skip
        with pytest.raises(DataError, match=rf"^'{tmp_path}/m' is not a manifest[^\n]*$"):
            write_numbers(**broken)


@pytest.mark.parametrize("before", [None, b"an older manifest"])
def test_a_failed_or_interrupted_build_leaves_the_older_file(tmp_path, monkeypatch, before):
    def files():
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def records(error=None):
        yield numbered("a", 3, poses=poses(3))
        assert files() == older
        if error:
            raise error

    if before:
        (tmp_path / "m.arrow").write_bytes(before)
    older = files()
    for error in (DataError, KeyboardInterrupt):
        with pytest.raises(error):
            write(tmp_path / "m.arrow", records(error))
        assert files() == older
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("fastmum.data.manifest_writer.os.fsync", full)
    with pytest.raises(DataError, match=r"m.arrow' cannot be written \(No space left on device\)"):
        write(tmp_path / "m.arrow", records())
    assert files() == older


def test_a_relative_root_starts_at_the_manifest_and_pickles_are_paths(tmp_path):
    write(tmp_path / "m.arrow", [numbered("a", 500)], root="frames")
    for opened in (Manifest(tmp_path / "m.arrow"), Manifests([tmp_path / "m.arrow"])):
        sent = pickle.dumps(opened)
        assert len(sent) < 400
        assert pickle.loads(sent).file(499) == opened.file(499) == tmp_path / "frames/a/499.jpg"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 17))
def test_starts_are_found_for_any_lengths(lengths, block):
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    assert changes(numbers, block).tolist() == np.cumsum([0, *lengths])[:-1].tolist()


def test_an_invalid_sequence_is_named(tmp_path):
    for records, message in (
        ([], "no sequence"),
        ([numbered("a", 0)], "sequence 'a' of rooms has no frames"),
        ([SequenceRecord("", ["a.jpg"])], "has no name"),
        ([numbered("a", 1), numbered("a", 2)], "sequence 'a' of rooms appears twice"),
        *(([SequenceRecord("a", [path])], f"'{path}'") for path in ("/etc/x.jpg", "../x.jpg", "b/")),
        ([SequenceRecord("a", ["\udcff.jpg"])], "is not UTF-8"),
        ([numbered("a", 2, poses=poses(3))], r"poses? of shape \(3, 4, 4\), but must have \(2, 4, 4\)"),
        ([numbered("a", 2, intrinsics=np.ones((2, 3)))], r"intrinsics of shape \(2, 3\)"),
        ([numbered("a", 1, depths=["../e.png"], depth_format=MILLIMETRES)], "'../e.png'"),
        ([numbered("a", 2, masks=["m.png"])], "1 mask paths for 2 frames"),
        ([numbered("a", 1, depths=["d.png"])], "no depth_format"),
        ([numbered("a", 1, depths=["d"], depth_format=RAYS, depth_units=np.ones(2))], "depth_units of shape"),
    ):
        with pytest.raises(DataError, match=rf"^[^\n]*{message}[^\n]*$"):
            write(tmp_path / "m", records)
        assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_opened_are_named_in_one_line(tmp_path, monkeypatch):
    write(tmp_path / "m.arrow", [numbered("a", 200)])
    whole = (tmp_path / "m.arrow").read_bytes()
    (tmp_path / "short").write_bytes(whole[:-40])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("not arrow\n" * 100)
    monkeypatch.setattr("fastmum.data.manifest_writer.VERSION", 9)
    write(tmp_path / "newer", [numbered("a", 200)])
    pa.ipc.new_file(tmp_path / "other", pa.schema([("a", pa.int8())])).close()
    messages = dict.fromkeys(("empty", "text", "other"), "is not a manifest")
    messages |= {"nowhere": "no manifest", "short": "truncated", "newer": "version 9", ".": "cannot be read"}
    for name, message in messages.items():
        with pytest.raises(DataError, match=rf"^[^\n]*{tmp_path / name}[^\n]*$") as caught:
            Manifest(tmp_path / name)
        assert message in str(caught.value)
    with pytest.raises(DataError, match="no manifest was given"):
        Manifests([])
    with pytest.raises(DataError, match=r"cannot be written \(No such file"):
        write(tmp_path / "no/folder/m.arrow", [numbered("a", 1)])


def test_opening_allocates_a_few_bytes_per_sequence_not_per_frame(tmp_path):
    """A million frames; the 20 million of the paper are in the benchmarks."""
    names = [[f"{s:04d}/{s}_{i:05d}.jpg" for i in range(100)] for s in range(10_000)]
    assert write(tmp_path / "m.arrow", (SequenceRecord(f[0][:4], f) for f in names)).frames == 1_000_000
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    manifest = Manifest(tmp_path / "m.arrow")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 20 * manifest.num_sequences
    assert peak < 40 * manifest.num_sequences + (8 << 20)
    assert pa.total_allocated_bytes() - arrow < 1 << 16, "Arrow maps the columns, it does not read them"
    assert manifest.file(999_999).name == "9999_00099.jpg"


@pytest.mark.parametrize("n", [1, 9, 3000])
def test_blocks_of_rows_with_and_without_unknown_values(tmp_path, n):
    """Columns that are known for all rows have no bitmaps in the file."""
    places = [Place("a.tar", 512 * i, i, i) for i in range(n)]
    whole = {"poses": poses(n), "intrinsics": np.ones((n, 4)), "masks": ["m.png"] * n, "places": {"path": places}}
    for unknown in (False, True):
        records = [numbered("a", n, **whole), *([numbered("b", 2)] * unknown)]
        write(tmp_path / "m.arrow", records)
        manifest = Manifest(tmp_path / "m.arrow")
        assert [place.offset for place in manifest.places("path", np.arange(n))] == [512 * i for i in range(n)]
        assert np.array_equal(manifest.camera_arrays(n - 1)[1], poses(n)[n - 1])
        assert manifest.present("mask").tolist() == [True] * n + [False] * (2 * unknown)
