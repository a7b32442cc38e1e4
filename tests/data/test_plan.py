"""The paper's sampling: shapes, distribution, purity, and the geometry of crops."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmum.data.plan import Crop, StepPlanner, centre_box, whole_frame
from fastmum.data.sequences import Sequences


def scenes(*sizes, name="s"):
    frames = tuple(tuple(Path(f"{name}{i}/{j}.jpg") for j in range(size)) for i, size in enumerate(sizes))
    return Sequences(tuple(f"{name}{i}" for i in range(len(sizes))), frames)


@pytest.fixture
def planner():
    return StepPlanner(scenes(24, 30, 24), seed=0, frames_per_batch=96, views=(2, 24))


def test_a_plan_is_a_function_of_seed_rank_and_step(planner):
    first = planner.plan(7, rank=1)
    again = StepPlanner(scenes(24, 30, 24), 0, 96, (2, 24)).plan(7, rank=1)
    assert first.files == again.files
    boxes = [[c.box(320, 240) for c in plan.crops] for plan in (first, again)]
    assert boxes[0] == boxes[1]
    for other in (
        planner.plan(8, rank=1),
        planner.plan(7, rank=0),
        StepPlanner(scenes(24, 30, 24), 1, 96, (2, 24)).plan(7, 1),
    ):
        assert other.files != first.files


def test_as_many_sequences_of_equal_length_as_fit(planner):
    for step in range(200):
        plan = planner.plan(step)
        views = plan.lengths[0]
        assert plan.lengths == (views,) * (96 // views)
        assert len(plan.files) == len(plan.crops) == len(plan.spare) == sum(plan.lengths)
        for begin in range(0, len(plan.files), views):
            part = plan.files[begin : begin + views]
            assert len({f.parent for f in part}) == 1, "frames of one sequence come from one scene"
            assert len(set(part)) == views, "drawn without replacement"


def test_number_of_views_and_scenes_are_uniform():
    planner = StepPlanner(scenes(24, 24), 0, 24, (2, 9))
    plans = [planner.plan(step) for step in range(4000)]
    views = Counter(plan.lengths[0] for plan in plans)
    assert set(views) == set(range(2, 10))
    assert all(abs(count / 4000 - 1 / 8) < 0.02 for count in views.values())
    first = Counter(plan.files[0].parent.name for plan in plans)
    assert abs(first["s0"] / 4000 - 0.5) < 0.03
    frames = Counter(file.name for plan in plans for file in plan.files)
    share = np.array(list(frames.values())) / sum(frames.values())
    assert len(frames) == 24
    assert np.abs(share - 1 / 24).max() < 0.003


def test_short_sequences_are_passed_over_for_many_views():
    planner = StepPlanner(scenes(3, 6), 0, 12, (2, 24))
    seen = set()
    for step in range(100):
        plan = planner.plan(step)
        seen.add(plan.lengths[0])
        assert plan.lengths[0] <= 6
        if plan.lengths[0] > 3:
            assert {f.parent.name for f in plan.files} == {"s1"}
    assert seen == {2, 3, 4, 5, 6}


def test_single_images_take_their_share_of_batches():
    images = scenes(*[1] * 50, name="i")
    planner = StepPlanner(scenes(24), 0, 8, (2, 4), images=images, image_share=0.1)
    plans = [planner.plan(step) for step in range(3000)]
    single = [plan for plan in plans if plan.lengths[0] == 1]
    assert len(single) / 3000 == pytest.approx(0.1, abs=0.02)
    assert all(plan.lengths == (1,) * 8 for plan in single)
    assert all(len(set(spare)) > 1 for plan in single for spare in plan.spare), "a broken image can be replaced"


@given(
    width=st.integers(1, 700), height=st.integers(1, 700), corner=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    areas=st.lists(st.floats(0.2, 1), min_size=10, max_size=10),
    aspects=st.lists(st.floats(0.75, 1.3334), min_size=10, max_size=10),
)  # fmt: skip
def test_a_crop_lies_within_its_frame(width, height, corner, areas, aspects):
    crop = Crop(np.array(areas), np.array(aspects), np.array(corner), flip=False)
    left, top, right, bottom = crop.box(width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_keep_the_share_and_aspect_that_were_drawn(planner):
    boxes = np.array([c.box(1000, 1000) for step in range(40) for c in planner.plan(step).crops], float)
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = w * h / 1e6, w / h
    assert area.min() >= 0.199
    assert area.max() <= 1
    assert aspect.min() >= 0.745
    assert aspect.max() <= 1.34
    assert area.mean() == pytest.approx(0.538, abs=0.01)  # by integration over the draws that fit a square
    assert np.log(aspect).mean() == pytest.approx(0, abs=0.02)
    flips = [c.flip for step in range(40) for c in planner.plan(step).crops]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.03)


def test_the_whole_frame_is_the_largest_square_in_the_middle():
    assert whole_frame().box(300, 200) == centre_box(300, 200) == (50, 0, 250, 200)
    assert whole_frame().box(200, 300) == (0, 50, 200, 250)
    assert not whole_frame().flip
