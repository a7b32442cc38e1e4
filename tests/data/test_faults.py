"""Bad frames: counted, listed, replaced, and a stop when there are too many."""

import logging

import numpy as np
import pytest

from fastmum.data.errors import DataError
from fastmum.data.loader import MIN_FRAMES, Faults
from fastmum.data.manifest import Manifests, SequenceRecord, write_manifest


@pytest.fixture
def manifests_of(tmp_path):
    """Manifests with a data set for each keyword, whose sequences have the lengths given."""

    def of(**datasets):
        for name, lengths in datasets.items():
            frames = [[f"{name}/s{i}/{j}.jpg" for j in range(n)] for i, n in enumerate(lengths)]
            records = [SequenceRecord(f"s{i}", files) for i, files in enumerate(frames)]
            write_manifest(tmp_path / f"{name}.arrow", records, dataset=name, root=tmp_path, metadata={})
        return Manifests([tmp_path / f"{name}.arrow" for name in datasets])

    return of


def fail(faults, rows, reason="truncated"):
    for row in rows:
        faults.add(row, faults.manifests.file(row), reason)
    faults.check()


def test_frames_are_counted_once_and_the_first_are_logged(manifests_of, caplog):
    faults = Faults(manifests_of(a=[1000], b=[100]))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            faults.read(np.arange(1100))
            fail(faults, [*range(20), 1050])
    assert faults.counts == {"a": 20, "b": 1}
    assert caplog.text.count("cannot be decoded") == 3 + 1


def test_every_bad_frame_is_listed_once_over_runs_and_processes(manifests_of, tmp_path):
    manifests, log = manifests_of(a=[500], b=[500], c=[500]), tmp_path / "run" / "bad_frames.log"
    first, other = Faults(manifests, log), Faults(manifests, log)
    assert not log.exists(), "no file before there is a bad frame"
    for faults in (first, other):
        faults.read(np.arange(1500))
    fail(first, [1, 700])
    fail(other, [1, 2])
    fail(first, [2], "two\nlines")
    with open(log, "a") as lines:
        lines.write("a set of another run\t/images/0.jpg\tempty\n")
    later = Faults(manifests, log)
    assert later.counts == first.counts == other.counts == {"a": 2, "b": 1}
    later.read(np.arange(1500))
    fail(later, [700, 3, 1200], "two\nlines")
    rows = [(1, "truncated"), (700, "truncated"), (2, "truncated"), (3, "two lines"), (1200, "two lines")]
    lines = [line.split("\t") for line in log.read_text().splitlines() if "another run" not in line]
    assert lines == [[manifests.datasets[row // 500], str(manifests.file(row)), why] for row, why in rows]
    assert Faults(manifests, log).counts == first.counts == {"a": 3, "b": 1, "c": 1}


def test_frames_found_before_a_resume_do_not_count_towards_the_limit(manifests_of, tmp_path):
    manifests, log = manifests_of(a=[500]), tmp_path / "bad_frames.log"
    before = Faults(manifests, log)
    before.read(np.arange(500))
    fail(before, range(25))
    resumed = Faults(manifests, log)
    resumed.read(np.arange(20, 50))
    fail(resumed, [20])
    assert resumed.counts == {"a": 25}


def test_a_file_of_two_data_sets_is_bad_in_both(tmp_path):
    record = SequenceRecord("s", ["0.jpg"])
    write_manifest(tmp_path / "m", [record, record._replace(dataset="b")], dataset="a", root=tmp_path, metadata={})
    faults = Faults(Manifests([tmp_path / "m"]), tmp_path / "bad_frames.log")
    faults.read(np.arange(2))
    fail(faults, [0, 1])
    assert faults.counts == Faults(faults.manifests, tmp_path / "bad_frames.log").counts == {"a": 1, "b": 1}


def test_a_log_that_cannot_be_read_or_written_is_named(manifests_of, tmp_path, monkeypatch):
    manifests = manifests_of(a=[100])
    (tmp_path / "file").write_text("a\t0.jpg\tempty\n")
    faults = Faults(manifests, tmp_path / "file" / "bad_frames.log")
    faults.read(np.arange(100))
    with pytest.raises(DataError, match=r"bad_frames.log' cannot be written"):
        fail(faults, [0])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match=r"file' cannot be read \(Permission denied\)"):
        Faults(manifests, tmp_path / "file")


def test_more_than_five_per_cent_of_a_data_set_stop_the_run(manifests_of, tmp_path):
    faults = Faults(manifests_of(a=[100], b=[1000]), tmp_path / "bad_frames.log")
    faults.read(np.arange(1100))
    fail(faults, range(5))
    with pytest.raises(DataError, match=r"6 of 100 .*'a' .*a/s0/0.jpg', .*a/s0/2.jpg'; .*bad_frames.log'") as caught:
        fail(faults, [5])
    assert "3.jpg" not in str(caught.value)


def test_where_the_limit_is(manifests_of):
    for length, read, limit in (
        (MIN_FRAMES - 1, MIN_FRAMES - 1, None),  # too few
        (MIN_FRAMES, MIN_FRAMES, 2),  # all were read: 5 % exactly
        (1000, 1000, 51),
        (10**5, 100, 12),  # few of many were read: 5 % and three standard errors
        (10**5, 5_000, 296),
    ):
        faults = Faults(manifests_of(a=[length]))
        faults.read(np.arange(read))
        fail(faults, range(read if limit is None else limit - 1))
        if limit is not None:
            with pytest.raises(DataError):
                fail(faults, [limit - 1])


def test_good_frames_can_settle_the_verdict(manifests_of):
    """11 of 180 may be chance while 20 are unread; 11 of 200 are more than 5 %."""
    faults = Faults(manifests_of(a=[200], b=[200]))
    faults.read(np.arange(180))
    fail(faults, range(11))
    faults.read(np.arange(200, 400))
    faults.check()
    faults.read(np.arange(180, 200))
    with pytest.raises(DataError, match="11 of 200 frames of the data set 'a'"):
        faults.check()


def test_replacements_are_neighbours_that_the_batch_does_not_have(manifests_of):
    faults = Faults(manifests_of(a=[3, 6, 2], b=[4]))
    order = list(faults.replacements(5, taken={5, 6, 8}))
    assert order[:5] == [7, 3, 4, 6, 8], "sequence 3..8 from 5 on, those in the batch last"
    assert set(order[5:]) == {0, 1, 2, 9, 10}, "then the other sequences of the data set"
    faults.read(np.array([7]))
    fail(faults, [7])
    assert list(faults.replacements(5, taken={5, 6, 8}))[:2] == [3, 4]


def test_held_out_and_training_frames_never_replace_each_other(manifests_of):
    held_out = np.array([False, True, False, True, False, True, True])
    faults = Faults(manifests_of(a=[2] * 5, imagenet=[1, 1]), held_out=held_out)
    assert list(faults.replacements(0, {0})) == [1, 4, 5, 8, 9]
    assert list(faults.replacements(3, {2, 3})) == [2, 7, 6], "a duplicate in the sequence before another sequence"
    assert list(faults.replacements(8, {8})) == [9, 0, 1, 4, 5]
    assert list(faults.replacements(10, {10})) == [11]
    faults = Faults(manifests_of(a=[5], imagenet=[1] * 50))
    assert list(faults.replacements(20, taken={20})) == [21, 22, 23], "the next single images"
    assert list(faults.replacements(54, taken={54})) == [5, 6, 7], "the first follow the last"
