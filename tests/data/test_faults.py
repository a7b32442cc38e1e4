"""Bad frames: counted, listed, replaced, and a stop when there are too many."""

import logging
import re

import numpy as np
import pytest

from fastmum.data.errors import DataError
from fastmum.data.faults import MIN_FRAMES, Faults
from fastmum.data.manifest import Manifests, SequenceRecord, write_manifest


@pytest.fixture
def manifests_of(tmp_path):
    """Manifests with a data set for each keyword, whose sequences have the lengths given."""

    def of(**datasets):
        paths = []
        for name, lengths in datasets.items():
            records = [
                SequenceRecord(f"s{i}", [f"{name}/s{i}/{j}.jpg" for j in range(n)]) for i, n in enumerate(lengths)
            ]
            paths.append(tmp_path / f"{name}.arrow")
            write_manifest(paths[-1], records, dataset=name, root=tmp_path, metadata={})
        return Manifests(paths)

    return of


def fail(faults, rows, reason="truncated"):
    for row in rows:
        faults.add(row, faults.manifests.file(row), reason)
    faults.check()


def test_frames_are_counted_once_by_data_set(manifests_of, caplog):
    faults = Faults(manifests_of(a=[100], b=[100]))
    for _ in range(3):
        faults.read(np.arange(200))
        fail(faults, [3, 5, 150])
    assert faults.counts == {"a": 2, "b": 1}
    assert sum(faults.counts.values()) == 3
    assert caplog.text.count("cannot be decoded") == 3


def test_only_the_first_files_of_a_data_set_are_named_on_the_screen(manifests_of, caplog):
    faults = Faults(manifests_of(a=[1000]))
    with caplog.at_level(logging.WARNING):
        faults.read(np.arange(1000))
        fail(faults, range(20))
    assert caplog.text.count("cannot be decoded") == 3


def test_every_bad_frame_is_listed_once_even_over_runs_and_processes(manifests_of, tmp_path):
    manifests, log = manifests_of(a=[500], b=[500]), tmp_path / "run" / "bad_frames.log"
    first, other = Faults(manifests, log), Faults(manifests, log)
    assert not log.exists(), "no file before there is a bad frame"
    for faults in (first, other):
        faults.read(np.arange(1000))
    fail(first, [1, 700])
    fail(other, [1, 2])
    fail(first, [2], "two\nlines")
    later = Faults(manifests, log)
    later.read(np.arange(1000))
    fail(later, [700, 3])
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    assert lines == [[manifests.datasets[row >= 500], str(manifests.file(row)), "truncated"] for row in (1, 700, 2, 3)]


def test_a_resumed_run_goes_on_counting(manifests_of, tmp_path):
    manifests, log = manifests_of(a=[500], b=[500], c=[500]), tmp_path / "bad_frames.log"
    before = Faults(manifests, log)
    before.read(np.arange(1000))
    fail(before, [1, 2, 700])
    with open(log, "a") as lines:
        lines.write("a set of another run\t/images/0.jpg\tempty\n")
    resumed = Faults(manifests, log)
    assert resumed.counts == before.counts == {"a": 2, "b": 1}
    resumed.read(np.arange(1500))
    fail(resumed, [2, 3, 700, 1200])
    assert resumed.counts == {"a": 3, "b": 1, "c": 1}, "those found again count once"
    assert sum(resumed.counts.values()) == 5
    assert Faults(manifests, log).counts == resumed.counts


def test_frames_found_before_a_run_was_resumed_do_not_count_against_those_read_since(manifests_of, tmp_path):
    manifests, log = manifests_of(a=[500]), tmp_path / "bad_frames.log"
    before = Faults(manifests, log)
    before.read(np.arange(500))
    fail(before, range(25))
    resumed = Faults(manifests, log)
    resumed.read(np.arange(20, 50))
    fail(resumed, [20])
    assert sum(resumed.counts.values()) == 25


def test_a_file_of_two_data_sets_is_bad_in_both(tmp_path):
    paths = []
    for name in ("a", "b"):
        paths.append(tmp_path / f"{name}.arrow")
        write_manifest(paths[-1], [SequenceRecord("s", ["0.jpg"])], dataset=name, root=tmp_path, metadata={})
    faults = Faults(Manifests(paths), tmp_path / "bad_frames.log")
    faults.read(np.arange(2))
    fail(faults, [0, 1])
    assert faults.counts == Faults(faults.manifests, tmp_path / "bad_frames.log").counts == {"a": 1, "b": 1}


def test_a_log_that_cannot_be_read_is_named(manifests_of, tmp_path, monkeypatch):
    (tmp_path / "bad_frames.log").write_text("a\t0.jpg\tempty\n")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    manifests = manifests_of(a=[5])
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match=r"bad_frames.log' cannot be read \(Permission denied\)"):
        Faults(manifests, tmp_path / "bad_frames.log")


def stops_at(faults, read, bad):
    """How many of the bad rows are noted before the run stops."""
    faults.read(np.asarray(read))
    for i, row in enumerate(bad):
        try:
            fail(faults, [row])
        except DataError:
            return i + 1
    return None


def test_more_than_five_per_cent_of_a_data_set_stop_the_run(manifests_of, tmp_path):
    faults = Faults(manifests_of(a=[100], b=[1000]), tmp_path / "bad_frames.log")
    faults.read(np.arange(1100))
    fail(faults, range(5))
    expected = (
        r"6 of 100 frames of the data set 'a' cannot be decoded, such as "
        r"'\S+a/s0/0.jpg', '\S+a/s0/1.jpg', '\S+a/s0/2.jpg'; all are listed in '\S+bad_frames.log'; restore them"
    )
    with pytest.raises(DataError, match=expected):
        fail(faults, [5])


@pytest.mark.parametrize(
    ("length", "read", "limit"),
    [
        (3, 3, None),  # one of three is not a verdict
        (MIN_FRAMES - 1, MIN_FRAMES - 1, None),
        (MIN_FRAMES, MIN_FRAMES, 2),  # all were read: 5 % exactly
        (1000, 1000, 51),
        (10**6, 20, 4),  # few of many were read: 5 % and three standard errors
        (10**6, 100, 12),
        (10**6, 10_000, 566),
    ],
)
def test_where_the_limit_is(manifests_of, length, read, limit):
    assert stops_at(Faults(manifests_of(a=[length])), range(read), range(min(read, 600))) == limit


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


@pytest.mark.parametrize("bad", [10, 11])
def test_the_verdict_over_all_frames_is_exact_in_every_order(manifests_of, bad):
    """10 of 200 are 5 %, and never stop once the last was read; 11 always have stopped by then."""
    manifests = manifests_of(a=[200])
    for seed in range(20):
        faults, order = Faults(manifests), np.random.default_rng(seed).permutation(200)
        broken = set(np.random.default_rng((seed, 1)).permutation(200)[:bad].tolist())
        stopped = None
        for begin in range(0, 200, 20):
            rows = order[begin : begin + 20]
            faults.read(rows)
            try:
                fail(faults, broken.intersection(rows.tolist()))
            except DataError:
                stopped = begin + 20
        assert (stopped == 200) == (bad == 11)


def test_a_share_of_four_per_cent_hardly_ever_stops_a_run_and_ten_per_cent_soon_do(manifests_of):
    manifests = manifests_of(a=[20_000])

    def stop(share, seed):
        rng = np.random.default_rng(seed)
        faults, bad = Faults(manifests), set(np.flatnonzero(rng.random(20_000) < share).tolist())
        for begin in range(0, 2_000, 100):
            rows = rng.integers(0, 20_000, 100)
            faults.read(rows)
            try:
                fail(faults, bad.intersection(rows.tolist()))
            except DataError:
                return begin + 100
        return None

    assert sum(stop(0.04, seed) is not None for seed in range(40)) <= 1
    assert all(stop(0.12, seed) is not None for seed in range(40))


def test_replacements_are_neighbours_that_the_batch_has_not(manifests_of):
    faults = Faults(manifests_of(a=[3, 6, 2], b=[4]))
    order = list(faults.replacements(5, taken={5, 6, 8}))
    assert order[:5] == [7, 3, 4, 6, 8], "sequence 3..8 from 5 on, those in the batch last"
    assert set(order[5:]) == {0, 1, 2, 9, 10}, "then the data set's other sequences, none of b"
    assert order == list(faults.replacements(5, taken={5, 6, 8}))
    faults.read(np.array([7]))
    fail(faults, [7])
    assert list(faults.replacements(5, taken={5, 6, 8}))[:2] == [3, 4]


def test_what_is_held_out_and_what_is_not_never_replace_each_other(manifests_of):
    held_out = np.array([False, True, False, True, False, True, True])
    faults = Faults(manifests_of(a=[2] * 5, imagenet=[1, 1]), held_out=held_out)
    assert list(faults.replacements(0, {0})) == [1, 4, 5, 8, 9]
    assert list(faults.replacements(3, {2, 3})) == [2, 7, 6], "a duplicate in the sequence before another sequence"
    assert list(faults.replacements(8, {8})) == [9, 0, 1, 4, 5]
    assert list(faults.replacements(10, {10})) == [11]


def test_single_images_are_replaced_by_the_next_of_their_set(manifests_of):
    faults = Faults(manifests_of(a=[5], imagenet=[1] * 50))
    assert list(faults.replacements(20, taken={20})) == [21, 22, 23]
    assert list(faults.replacements(54, taken={54})) == [5, 6, 7], "the first follow the last"


def test_a_log_that_cannot_be_written_is_named(manifests_of, tmp_path):
    (tmp_path / "file").write_text("")
    faults = Faults(manifests_of(a=[100]), tmp_path / "file" / "bad_frames.log")
    faults.read(np.arange(100))
    with pytest.raises(DataError, match=re.escape(f"'{tmp_path}/file/bad_frames.log' cannot be written")):
        fail(faults, [0])
