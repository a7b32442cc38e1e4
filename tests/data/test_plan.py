"""Plans: purity, exact batches, statistics of the modes, data sets by weight, simulated throughput, random crops."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum.data.decode.image import AREAS, ASPECTS, CORNER, CROP_WIDTH, crop_box, crop_boxes, draw_crops, whole_frames
from fastmum.data.errors import DataError
from fastmum.data.packing import paper_shares
from fastmum.data.plan import MODES, Catalogue, Mixture, StepPlanner, by_frames, by_weight
from fastmum.data.plan_table import main, operations, table
from fastmum.model.config import PRESETS, step_flops


def catalogue(**datasets):
    """Data sets by name, each a list of sequence lengths."""
    lengths = np.concatenate(list(datasets.values()))
    of = np.repeat(np.arange(len(datasets)), [len(v) for v in datasets.values()]).astype(np.int16)
    return Catalogue(tuple(datasets), np.concatenate([[0], lengths.cumsum()]), of)


PAPER = paper_shares(np.arange(2, 25), 96)
PLAIN = catalogue(a=[24], images=[1])
# Two data sets of long sequences, one of short ones, and single images.
MIXED = catalogue(a=[100] * 30, b=[24, 30, 300], short=[10] * 40, images=[1] * 200)


def sequence_of(rows):
    return np.searchsorted(MIXED.starts, rows, side="right") - 1


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def frames_by_length(lengths):
    """(25,) share of frames in sequences of each length."""
    return np.bincount(lengths, lengths, minlength=25) / lengths.sum()


@pytest.mark.parametrize("mode", MODES)
def test_plans_are_well_formed_functions_of_seed_step_rank_and_world_size(mode):
    planner, other = (StepPlanner(MIXED, mode=mode, seed=seed, world_size=4) for seed in (3, 4))
    plans = {(step, rank): planner.plan(step, rank) for step in range(25) for rank in range(4)}
    again, sizes = pickle.loads(pickle.dumps(planner)), np.diff(MIXED.starts)
    for (step, rank), plan in reversed(plans.items()):
        assert same(again.plan(step, rank), plan), "in any order"
        assert np.array_equal(again.lengths(step, rank), plan.lengths)
        assert [a.dtype for a in plan] == [np.int64, np.int64, np.float32, bool]
        assert len(plan.rows) == plan.lengths.sum()
        assert len(plan.rows) == 96 or mode == "paper"
        assert plan.crops.shape == (len(plan.rows), CROP_WIDTH)
        assert (np.diff(plan.lengths) <= 0).all(), "longest first"
        for rows in np.split(plan.rows, plan.lengths.cumsum()[:-1]):
            (sequence,) = set(sequence_of(rows))
            assert len(set(rows)) == len(rows), "without replacement"
            assert len(rows) <= sizes[sequence]
            assert (len(rows) == 1) == (sizes[sequence] == 1)
    assert len({plan.rows.tobytes() for plan in [*plans.values(), other.plan(0, 0)]}) == 101
    assert np.mean([plan.flips.mean() for plan in plans.values()]) == pytest.approx(0.5, abs=0.02)
    frames = [sum(len(plans[step, rank].rows) for rank in range(4)) for step in range(25)]
    assert [planner.step_frames(step) for step in range(25)] == frames
    with pytest.raises(ValueError, match="rank 4"):
        planner.plan(0, 4)


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


@pytest.mark.parametrize("mode", ["packed", "balanced"])
def test_the_frames_of_a_step_do_not_depend_on_the_number_of_ranks(mode):
    """Eight ranks of 96 frames, four of 192, one of 768: the same sequences, crops and flips."""
    steps = []
    for ranks in (8, 4, 1):
        planner = StepPlanner(MIXED, None, 768 // ranks, mode=mode, world_size=ranks, seed=5)
        plans = [planner.plan(3, rank) for rank in range(ranks)]
        rows, _, crops, flips = (np.concatenate(column) for column in zip(*plans, strict=True))
        order = np.lexsort((crops[:, 0], rows))
        steps.append((rows[order], crops[order], flips[order]))
    assert len(steps[0][0]) == 768
    assert same(steps[0], steps[1])
    assert same(steps[0], steps[2])


@given(
    st.sampled_from([1, 2, 6, 8, 32, 48, 96, 97, 128]), st.integers(1, 24), st.integers(0, 23),
    st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from(MODES), st.lists(st.integers(1, 40), min_size=1, max_size=8),
)  # fmt: skip
@settings(deadline=None, max_examples=50)
def test_any_settings_are_planned_or_refused_in_one_line(frames, least, more, share, mode, lengths):
    views = (least, least + more)
    try:
        planner = StepPlanner(catalogue(a=lengths, images=[1] * 5), None, frames, views, share, mode, world_size=3)
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


def test_held_out_sequences_are_never_drawn():
    held_out = [0, 1, 31, 240]
    training = StepPlanner(MIXED, exclude=held_out)
    evaluation = StepPlanner(MIXED, only=held_out, imagenet_share=0.0)
    for step in range(40):
        assert not set(held_out) & set(sequence_of(training.plan(step).rows))
        assert set(sequence_of(evaluation.plan(step).rows)) <= {0, 1, 31}


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
        ({"a": [24] * 9}, {"weights": {"megadepth": 3.0}, "imagenet_share": 0.0}, "data.weights names 'megadepth'"),
    ):
        planner = StepPlanner(catalogue(**datasets), **options)
        assert (len(planner.notes), note is None or note in planner.notes[0]) == (note is not None, True)
        if options.get("imagenet_share") == 1.0 or "a" not in datasets:
            assert planner.lengths(0).tolist() == [1] * 96


def test_settings_that_cannot_be_met_are_refused():
    for options, key in (
        ({"mode": "fast"}, "data.mode"),
        ({"views": (24, 24), "frames_per_gpu": 97}, "data.views.*data.frames_per_batch.*data.imagenet_share"),
        ({"views": (8, 4)}, "data.views"),
        ({"views": (30, 40)}, "at least 30 frames .data.views"),
        ({"frames_per_gpu": 4, "views": (8, 9)}, "data.frames_per_batch"),
        ({"frames_per_gpu": 0}, "data.frames_per_batch"),
        ({"imagenet_share": 1.5}, "data.imagenet_share"),
        ({"seed": -1}, "run.seed"),
        ({"weights": {"mega": 1.0}}, "data.weights names 'mega'"),
        ({"weights": {"a": -1.0}}, "data.weights.a"),
        ({"weights": {"a": float("nan")}}, "data.weights.a"),
        ({"weights": {"a": 0.0}}, "data.weights is 0"),
    ):
        with pytest.raises(DataError, match=rf"^[^\n]*{key}[^\n]*$"):
            StepPlanner(catalogue(a=[24]), **options)


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=20), min_size=1, max_size=4),
    st.integers(2, 30), st.integers(0, 2**32),
)  # fmt: skip
@settings(deadline=None, max_examples=50)
def test_the_eligible_sequences_are_those_long_enough(lengths, longest, seed):
    datasets = catalogue(**{f"d{i}": v for i, v in enumerate(lengths)})
    sizes, rng = np.diff(datasets.starts), np.random.default_rng(seed)
    keep = rng.random(len(sizes)) < 0.7
    keep[0] = True
    mixture = Mixture(datasets, None, (1, longest), keep)
    for dataset in range(len(lengths)):
        for views in range(longest + 1):
            wanted = np.flatnonzero((datasets.dataset_of == dataset) & (sizes >= views) & keep)
            count = mixture.eligible[dataset, views]
            assert count == len(wanted)
            if count:
                uniform = (np.arange(count) + rng.random(count)) / count
                full = np.full(count, dataset), np.full(count, views)
                assert sorted(mixture.sequences(*full, uniform)) == wanted.tolist()


def test_frames_are_drawn_without_replacement_and_uniformly():
    mixture, rng = Mixture(catalogue(a=[30], i=[1]), None, (2, 24)), np.random.default_rng(0)
    mixture.settle(np.array([7, 24]), np.array([0.5, 0.5]), level=True)
    rows = np.array([mixture.draw(np.array([24, 7, 1]), 1, rng) for _ in range(4000)])
    assert (rows[:, 31] == 30).all(), "the single image"
    for columns in (rows[:, :24], rows[:, 24:31]):
        assert (np.diff(np.sort(columns, axis=1), axis=1) > 0).all()
        share = np.bincount(columns.ravel(), minlength=30) / columns.size
        assert np.abs(share - 1 / 30).max() < 0.004
    first = np.bincount(rows[:, 0], minlength=30) / 4000
    assert np.abs(first - 1 / 30).max() < 0.015, "in random order"


def test_data_sets_of_short_sequences_have_their_weight_of_the_frames_if_possible():
    planner = StepPlanner(MIXED, {"a": 2.0, "b": 1.0, "short": 1.0})
    assert not planner.notes
    rows = np.concatenate([planner.plan(step).rows for step in range(2000)])
    got = np.bincount(MIXED.dataset_of[sequence_of(rows)]) / len(rows)
    assert np.abs(got - [0.45, 0.225, 0.225, 0.1]).max() < 0.01

    eligible = np.array([[True, True, True], [True, True, False], [True, False, False]])
    shares, weights = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.35, 0.25])
    chances = by_frames(weights, eligible, shares)
    np.testing.assert_allclose(chances.sum(axis=1), 1)
    np.testing.assert_allclose(shares @ chances, weights, atol=1e-8)
    assert (chances[~eligible] == 0).all()
    assert shares @ by_weight(weights, eligible) != pytest.approx(weights, abs=0.01)
    np.testing.assert_allclose(by_frames(weights, np.ones((3, 3), bool), shares), np.tile(weights, (3, 1)))

    mixture = Mixture(catalogue(short=[3] * 9, long=[24] * 9), {"short": 9.0}, (2, 24))
    got = mixture.settle(np.array([2, 24]), np.array([0.2, 0.8]), level=True)
    np.testing.assert_allclose(got, [0.2, 0.8], atol=1e-3)
    assert len(mixture.notes) == 2
    assert "'short' gets 20.0%" in mixture.notes[0]


def test_full_and_level_batches_are_faster(capsys):
    (frame, pair), lengths = operations(PRESETS["mum_vitl16"]), [24, 5, 5, 2, 1]
    total = sum(lengths) * frame + sum(views**2 for views in lengths) * pair
    assert total == pytest.approx(step_flops(PRESETS["mum_vitl16"], 256, 64, lengths).total)
    rows = {(row.ranks, row.mode): row for row in table((1, 64), 40, PRESETS["mum_vitl16"])}
    assert rows[64, "paper"].speed == 1
    assert rows[64, "paper"].fill == pytest.approx(0.957, abs=0.005)
    assert rows[64, "packed"].fill == rows[64, "balanced"].fill == 1
    assert rows[64, "packed"].speed == pytest.approx(1.12, abs=0.03)
    assert rows[64, "balanced"].speed == pytest.approx(1.19, abs=0.02)
    assert 1 <= rows[64, "balanced"].imbalance < 1.02
    assert rows[1, "balanced"].speed == pytest.approx(1, abs=0.03)
    # The command prints a Markdown table, or one line of error.
    assert main(["--steps", "2", "--ranks", "1", "4"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 |")]) == 3
    assert main(["--steps", "1", "--views", "24", "24", "--imagenet-share", "0", "--frames-per-gpu", "97"]) == 2
    error = capsys.readouterr().err
    assert "data.views" in error
    assert error.count("\n") == 1


def reference(crop, width, height):
    """RandomResizedCrop.get_params of torchvision, with draws that are given."""
    crop = [float(value) for value in crop]
    low, high = crop[22:24]
    for area, aspect in zip(crop[:10], crop[10:20], strict=True):
        w = round(math.sqrt(width * height * area * aspect))
        h = round(math.sqrt(width * height * area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = math.floor(crop[20] * (width - w + 1)), math.floor(crop[21] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = max(min(width, round(height * high)), 1), max(min(height, round(width / low)), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@given(st.integers(0, 2**32), st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([(0.2, 1.0), (0.9, 1.0)]))
def test_boxes_are_those_of_torchvision(seed, width, height, scale):
    crops = draw_crops(np.random.default_rng(seed), 4, scale, (3 / 4, 4 / 3))
    boxes = crop_boxes(crops, np.array([[width, height]] * 4))
    for crop, box in zip(crops, boxes, strict=True):
        assert tuple(box) == reference(crop, width, height) == crop_box(crop, width, height)
        left, top, right, bottom = box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_draws_are_uniform():
    crops = draw_crops(np.random.default_rng(0), 20_000, (0.2, 1.0), (3 / 4, 4 / 3)).astype(float)
    assert crops.shape == (20_000, CROP_WIDTH)
    aspects = (np.log(crops[:, ASPECTS]) - math.log(3 / 4)) / math.log(16 / 9)
    for values in ((crops[:, AREAS] - 0.2) / 0.8, aspects, crops[:, CORNER]):
        histogram = np.histogram(values, bins=20, range=(-1e-6, 1 + 1e-6))[0] / values.size
        assert histogram.sum() == pytest.approx(1)
        assert np.abs(histogram - 0.05).max() < 0.004
    assert crops[:, CORNER].max() < 1
    # Over images of many shapes, by integration over the draws that fit a square.
    boxes = crop_boxes(crops, np.full((20_000, 2), 1000))
    assert np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).mean() / 1e6 == pytest.approx(0.538, abs=0.005)


def test_whole_frames_and_the_last_corner():
    """The largest square in the middle; the largest float32 below 1 as a corner, in the widest image there is."""
    boxes = crop_boxes(whole_frames(3), np.array([[300, 200], [200, 300], [64, 64]]))
    assert boxes.tolist() == [[50, 0, 250, 200], [0, 50, 200, 250], [0, 0, 64, 64]]
    crop = whole_frames(1)
    crop[:, AREAS], crop[:, CORNER] = 1e-4, np.nextafter(np.float32(1), np.float32(0))
    assert crop_box(crop[0], 60_000, 60_000) == (59_400, 59_400, 60_000, 60_000)
