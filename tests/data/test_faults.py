"""Bad frames: counted by sequences over all processes, listed, replaced; too many stop the run."""

import logging

import numpy as np
import pytest

from fastmum.data.errors import DataError
from fastmum.data.faults import MAX_TRIES, MIN_SEQUENCES, Faults
from fastmum.data.manifest import Manifests, SequenceRecord, write_manifest
from fastmum.data.plan import Catalogue, StepPlanner


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


def report(faults, read, bad=(), reason="truncated"):
    """Frames that were read, and those of them that are bad."""
    rows = np.array([*read])
    faults.read(rows, faults.manifests.files(rows), {rows.tolist().index(row): reason for row in bad})
    faults.check()


def test_frames_are_counted_once_and_the_first_are_logged(manifests_of, caplog):
    faults = Faults(manifests_of(a=[1000], b=[100]))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            report(faults, range(1100), [*range(20), 1050])
    assert faults.counts == {"a": 20, "b": 1}
    assert caplog.text.count("cannot be decoded") == 3 + 1


def test_every_bad_frame_is_listed_once_over_runs_and_processes(manifests_of, tmp_path):
    manifests, log = manifests_of(a=[500], b=[500], c=[500]), tmp_path / "run" / "bad_frames.log"
    first, other = Faults(manifests, log), Faults(manifests, log)
    assert not log.exists(), "no file before there is a bad frame"
    report(first, range(1500), [1, 700])
    report(other, range(1500), [1, 2])
    report(first, [2], [2], "two\nlines")
    with open(log, "a") as lines:
        lines.write("a set of another run\t/images/0.jpg\tempty\ncut by a fu")
    later = Faults(manifests, log)
    assert later.counts == first.counts == other.counts == {"a": 2, "b": 1}
    assert later.known(0), "another process listed a frame of the sequence"
    assert not later.known(2)
    report(later, range(1500), [700, 3, 1200], "two\nlines")
    rows = [(1, "truncated"), (700, "truncated"), (2, "truncated"), (3, "two lines"), (1200, "two lines")]
    assert [line.split("\t") for line in log.read_text().splitlines() if line[1:2] == "\t"] == [
        [manifests.datasets[row // 500], str(manifests.file(row)), why] for row, why in rows
    ]
    assert Faults(manifests, log).counts == first.counts == {"a": 3, "b": 1, "c": 1}
    # Frames found before a resume do not count towards the limit.
    before, resumed = (Faults(manifests, tmp_path / "bad_frames.log") for _ in range(2))
    report(before, range(500), range(25))
    report(resumed, range(20, 50), [20])
    assert resumed.counts == {"a": 25}
    # A file of two data sets is bad in both.
    record = SequenceRecord("s", ["0.jpg"])
    write_manifest(tmp_path / "m", [record, record._replace(dataset="b")], dataset="a", root=tmp_path, metadata={})
    faults = Faults(Manifests([tmp_path / "m"]), tmp_path / "two.log")
    for row in (0, 1):
        with pytest.raises(DataError):
            report(faults, [row], [row])
    assert faults.counts == Faults(faults.manifests, tmp_path / "two.log").counts == {"a": 1, "b": 1}


def test_lines_that_cannot_be_written_wait_and_the_run_goes_on(manifests_of, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.write_text("not a folder")
    manifests = manifests_of(a=[1000])
    faults, lost = (Faults(manifests, folder / "bad_frames.log") for _ in range(2))
    report(faults, range(1000), [0, 1])
    report(faults, range(1000), [2])
    report(lost, range(1000), [3])
    lost.close()
    assert faults.counts == {"a": 3}
    assert caplog.text.count("bad_frames.log' cannot be read or written") == 2, "once for each process"
    assert "bad_frames.log': 1 line" in caplog.text
    folder.unlink()
    faults.close()
    assert len((folder / "bad_frames.log").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("sequences", "read", "most"),
    [
        (1000, MIN_SEQUENCES - 1, None),  # too few
        (1000, MIN_SEQUENCES, 6),  # 5 % and half a standard error
        (1000, 1000, 50),  # all were read: 5 % exactly
        (20, 20, 1),
        (20, 14, None),  # too few of a small data set
        (40, 30, 1),
    ],
)
def test_where_the_limit_is(manifests_of, tmp_path, sequences, read, most):
    manifests = manifests_of(a=[10] * sequences, b=[10])
    faults = Faults(manifests, tmp_path / "bad_frames.log")
    report(faults, range(10 * read), range(10 * (read if most is None else most)))
    if most is None:
        return
    bad = range(10 * most, 10 * most + 10)
    with pytest.raises(DataError, match=rf"'a' .*{read} sequences.*'{tmp_path}/a/s0/0\.jpg'.*bad_frames\.log'"):
        report(faults, bad, bad)
    report(faults, bad)  # restored


class Scenes(Catalogue):
    """10,000 scenes of 50 frames without files."""

    num_sequences, num_frames = 10_000, 500_000

    def sequence_of(self, rows):
        return np.searchsorted(self.starts, rows, side="right") - 1


SCENES = Scenes(("scenes",), np.arange(10_001) * 50, np.zeros(10_000, np.int16))


def frames_until_it_stops(share, seed, processes, steps):
    """Frames that one process reads before a run with a share of missing scenes stops, None if it does not."""
    missing = np.random.default_rng(seed).permutation(10_000) < share * 10_000
    planner = StepPlanner(SCENES, imagenet_share=0, seed=seed, world_size=processes)
    ranks = [Faults(SCENES, processes=processes) for _ in range(processes)]
    for step in range(steps):
        for rank, faults in enumerate(ranks):
            rows = planner.plan(step, rank).rows
            faults.read(rows, rows, dict.fromkeys(np.flatnonzero(missing[rows // 50]).tolist(), "missing"))
        total = sum(faults.tally() for faults in ranks)
        try:
            for faults in ranks:
                faults.pool(total)
                faults.check()
        except DataError:
            return 96 * (step + 1)
    return None


@pytest.mark.parametrize("seeds", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_scenes_that_are_missing_as_a_whole_stop_a_run_above_five_percent(seeds):
    """With independent frames, or with each process judging by itself, a run stops at 1 % of missing scenes."""
    assert [frames_until_it_stops(0.02, seed, 64, 3) for seed in range(seeds)] == [None] * seeds
    assert [frames_until_it_stops(0.02, seed, 1, 60) for seed in range(seeds)] == [None] * seeds
    assert frames_until_it_stops(0.1, 0, 64, 21) <= 2000
    stopped = [frames_until_it_stops(0.1, seed, 1, 20) for seed in range(seeds)]
    assert None not in stopped


def test_replacements_are_neighbours_and_then_spread_over_the_whole_data_set(manifests_of):
    faults = Faults(manifests_of(a=[3, 6, 2], b=[4]))
    order = list(faults.replacements(5, taken={5, 6, 8, 0}))
    assert order[:5] == [7, 3, 4, 6, 8], "sequence 3..8 from 5 on, those in the batch last"
    assert order[5:] == [2, 9, 10, 1, 0], "then the other sequences of the data set in turn"
    report(faults, [7], [7])
    faults.no_replacement(3)
    assert list(faults.replacements(5, taken={5, 6, 8}))[:2] == [4, 6]
    assert faults.counts == {"a": 1}, "what was tried does not count"
    held = np.array([False, True, False, True, False, True, True])
    faults = Faults(manifests_of(a=[2] * 5, imagenet=[1, 1]), held_out=held)
    assert {*faults.replacements(0, {0})} == {1, 4, 5, 8, 9}
    assert list(faults.replacements(3, {2, 3})) == [2, 7, 6], "a duplicate in the sequence before another sequence"
    assert list(faults.replacements(10, {10})) == [11]
    faults = Faults(manifests_of(imagenet=[1] * 2000, long=[MAX_TRIES * 2, 2]))
    assert {*faults.replacements(20, {20})} == {*range(2000)} - {20}
    assert {4000, 4001} < {*[*faults.replacements(2000, {2000})][:MAX_TRIES]}, "not only its own frames"
