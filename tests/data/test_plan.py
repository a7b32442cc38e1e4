"""Plans: purity, exact batches, and the statistics of the three modes."""

import pickle

import numpy as np
import pytest
from catalogue import Catalogue
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum.data.decode.image import CROP_WIDTH
from fastmum.data.errors import DataError
from fastmum.data.manifest import SequenceRecord, write_manifest
from fastmum.data.packing import paper_shares
from fastmum.data.plan import MODES, StepPlanner

PAPER = paper_shares(np.arange(2, 25), 96)
PLAIN = Catalogue(a=[24], images=[1])


@pytest.fixture
def catalogue():
    """Two data sets of long sequences, one of short ones, and single images."""
    return Catalogue(a=[100] * 30, b=[24, 30, 300], short=[10] * 40, images=[1] * 200)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def frames_by_length(lengths):
    """(25,) share of frames in sequences of each length."""
    return np.bincount(lengths, lengths, minlength=25) / lengths.sum()


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_is_a_function_of_seed_step_rank_and_world_size(catalogue, mode):
    planner = StepPlanner(catalogue, mode=mode, seed=3, world_size=4)
    plans = {(step, rank): planner.plan(step, rank) for step in range(5) for rank in range(4)}
    again = pickle.loads(pickle.dumps(StepPlanner(catalogue, mode=mode, seed=3, world_size=4)))
    for (step, rank), plan in reversed(plans.items()):
        assert same(again.plan(step, rank), plan), "in any order"
        assert np.array_equal(again.lengths(step, rank), plan.lengths)
    distinct = {plan.rows.tobytes() for plan in plans.values()}
    distinct |= {StepPlanner(catalogue, mode=mode, seed=4, world_size=4).plan(0, 0).rows.tobytes()}
    assert len(distinct) == 21
    frames = [sum(len(plans[step, rank].rows) for rank in range(4)) for step in range(5)]
    assert [planner.step_frames(step) for step in range(5)] == frames
    with pytest.raises(ValueError, match="rank 4"):
        planner.plan(0, 4)


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_is_well_formed(catalogue, mode):
    planner = StepPlanner(catalogue, mode=mode, world_size=2)
    sizes = np.diff(catalogue.starts)
    flips = []
    for step in range(100):
        plan = planner.plan(step, step % 2)
        assert plan.rows.dtype == plan.lengths.dtype == np.int64
        assert plan.crops.dtype == np.float32
        assert plan.flips.dtype == bool
        assert len(plan.rows) == plan.lengths.sum()
        assert len(plan.rows) == 96 or mode == "paper"
        assert plan.crops.shape == (len(plan.rows), CROP_WIDTH)
        assert (np.diff(plan.lengths) <= 0).all(), "longest first"
        for rows in np.split(plan.rows, plan.lengths.cumsum()[:-1]):
            (sequence,) = set(catalogue.sequence_of(rows))
            assert len(set(rows)) == len(rows), "without replacement"
            assert len(rows) <= sizes[sequence]
            assert (len(rows) == 1) == (sizes[sequence] == 1)
        flips.append(plan.flips.mean())
    assert np.mean(flips) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("mode", "share"), [("packed", 0.1), ("balanced", 0.0)])
def test_lengths_are_distributed_as_in_the_paper(mode, share):
    planner = StepPlanner(PLAIN, mode=mode, imagenet_share=share)
    drawn = [planner.lengths(step) for step in range(10_000)]
    assert {int(lengths.sum()) for lengths in drawn} == {96}
    got = frames_by_length(np.concatenate(drawn))
    wanted = np.array([0, share, *(1 - share) * PAPER])
    assert abs(got[1] - share) <= 0.001
    assert np.abs(got - wanted).sum() / 2 <= 0.01
    assert planner.filling.shares == pytest.approx(wanted[1:], abs=1e-3)


def test_the_paper_s_sampler_has_the_paper_s_shares():
    planner = StepPlanner(PLAIN, mode="paper")
    drawn = [planner.lengths(step) for step in range(10_000)]
    assert np.mean([lengths[0] == 1 for lengths in drawn]) == pytest.approx(0.1, abs=0.01), "share of batches"
    for lengths in drawn:
        assert lengths.tolist() == [lengths[0]] * (96 // lengths[0])
    got = frames_by_length(np.concatenate(drawn))
    assert np.abs(got[2:] / got[2:].sum() - PAPER).sum() / 2 <= 0.03
    assert got[1] == pytest.approx(9.6 / (9.6 + 0.9 * 91.35), abs=0.01)
    assert np.mean([lengths.sum() for lengths in drawn if lengths[0] > 1]) == pytest.approx(91.35, abs=0.3)


def test_the_cost_of_balanced_plans_is_level_for_any_number_of_ranks():
    costs = {}
    for mode in MODES:
        planner = StepPlanner(PLAIN, mode=mode, world_size=256)
        costs[mode] = np.array([[(planner.lengths(s, r) ** 2).sum() for r in range(256)] for s in range(10)])
    for ranks in (8, 64, 256):
        level = {m: (c[:, :ranks].max(axis=1) / c[:, :ranks].mean(axis=1)).mean() for m, c in costs.items()}
        assert level["balanced"] <= 1.02
        assert level["balanced"] < level["packed"] < level["paper"]


def test_data_sets_have_their_weights_of_the_frames(catalogue):
    """Even if the sequences of one are too short for most lengths."""
    planner = StepPlanner(catalogue, {"a": 2.0, "b": 1.0, "short": 1.0})
    assert not planner.notes
    rows = np.concatenate([planner.plan(step).rows for step in range(2000)])
    got = np.bincount(catalogue.dataset_of[catalogue.sequence_of(rows)]) / len(rows)
    assert np.abs(got - [0.45, 0.225, 0.225, 0.1]).max() < 0.01


@pytest.mark.parametrize("mode", ["packed", "balanced"])
def test_the_frames_of_a_step_do_not_depend_on_the_number_of_ranks(catalogue, mode):
    """Eight ranks of 96 frames, four of 192, one of 768: the same sequences, crops and flips."""

    def step(world_size):
        planner = StepPlanner(catalogue, None, 768 // world_size, mode=mode, world_size=world_size, seed=5)
        plans = [planner.plan(3, rank) for rank in range(world_size)]
        rows, _, crops, flips = (np.concatenate(column) for column in zip(*plans, strict=True))
        order = np.lexsort((crops[:, 0], rows))
        return rows[order], crops[order], flips[order]

    eight = step(8)
    assert len(eight[0]) == 768
    assert same(eight, step(4))
    assert same(eight, step(1))


@given(
    st.sampled_from([1, 2, 6, 8, 32, 48, 96, 97, 128]), st.integers(1, 24), st.integers(0, 23),
    st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from(MODES), st.lists(st.integers(1, 40), min_size=1, max_size=8),
)  # fmt: skip
@settings(deadline=None, max_examples=50)
def test_any_settings_are_planned_or_refused_in_one_line(frames, least, more, share, mode, lengths):
    views = (least, least + more)
    try:
        planner = StepPlanner(Catalogue(a=lengths, images=[1] * 5), None, frames, views, share, mode, world_size=3)
    except DataError as error:
        refusal = str(error)
        assert "data." in refusal
        assert "\n" not in refusal
        return
    for step in range(3):
        plan = planner.plan(step, 2)
        assert plan.lengths.sum() == len(plan.rows)
        assert len(plan.rows) == frames or mode == "paper"
        assert set(plan.lengths[plan.lengths > 1]) <= set(range(least, views[1] + 1))


def test_held_out_sequences_are_never_drawn(catalogue):
    held_out = [0, 1, 31, 240]
    training = StepPlanner(catalogue, exclude=held_out)
    evaluation = StepPlanner(catalogue, only=held_out, imagenet_share=0.0)
    for step in range(40):
        assert not set(held_out) & set(catalogue.sequence_of(training.plan(step).rows))
        assert set(catalogue.sequence_of(evaluation.plan(step).rows)) <= {0, 1, 31}


def test_deviations_from_the_settings_are_noted():
    for datasets, options, note in (
        ({"a": [24], "i": [1]}, {}, None),
        ({"a": [24]}, {}, "no single images"),
        ({"a": [10], "i": [1]}, {}, "at most 10 views"),
        ({"a": [24], "b": [3], "i": [1]}, {"views": (5, 24)}, "'b' is never drawn"),
        ({"a": [24], "i": [1]}, {"imagenet_share": 0}, "single images are never drawn"),
        ({"a": [24], "short": [3], "i": [1]}, {"imagenet_share": 1.0}, "sequences are never drawn"),
        ({"a": [24], "i": [1]}, {"views": (20, 24)}, "paper's shares of lengths"),
        ({"i": [1] * 5}, {}, None),
    ):
        planner = StepPlanner(Catalogue(**datasets), **options)
        assert (len(planner.notes), note is None or note in planner.notes[0]) == (note is not None, True)
        if options.get("imagenet_share") == 1.0 or "a" not in datasets:
            assert planner.lengths(0).tolist() == [1] * 96


def test_settings_that_cannot_be_met_are_refused():
    for options, message in (
        ({"mode": "fast"}, "data.mode"),
        ({"views": (24, 24), "frames_per_gpu": 97}, "data.views.*data.frames_per_batch.*data.imagenet_share"),
        ({"views": (8, 4)}, "data.views"),
        ({"views": (30, 40)}, "at least 30 frames .data.views"),
        ({"frames_per_gpu": 4, "views": (8, 9)}, "data.frames_per_batch"),
        ({"frames_per_gpu": 0}, "data.frames_per_batch"),
        ({"imagenet_share": 1.5}, "data.imagenet_share"),
        ({"seed": -1}, "run.seed"),
        ({"weights": {"mega": 1.0}}, "data.weights names 'mega', but the data sets are a"),
        ({"weights": {"a": -1.0}}, "data.weights.a"),
        ({"weights": {"a": float("nan")}}, "data.weights.a"),
        ({"weights": {"a": 0.0}}, "data.weights is 0 for every data set"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            StepPlanner(Catalogue(a=[24]), **options)
        assert "\n" not in str(caught.value)


def test_manifests_are_opened_by_path(tmp_path):
    for name, count, frames in (("a", 4, 30), ("images", 9, 1)):
        records = (SequenceRecord(f"s{i}", [f"{i}/{j}.jpg" for j in range(frames)]) for i in range(count))
        write_manifest(tmp_path / f"{name}.arrow", records, dataset=name, root=tmp_path, metadata={})
    planner = StepPlanner([tmp_path / "a.arrow", str(tmp_path / "images.arrow")])
    assert same(planner.plan(1), StepPlanner(Catalogue(a=[30] * 4, images=[1] * 9)).plan(1))
    assert same(pickle.loads(pickle.dumps(planner)).plan(1), planner.plan(1))
