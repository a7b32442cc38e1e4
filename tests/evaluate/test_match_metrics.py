"""Scores of warps, and the matcher that makes warps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum.evaluate.matcher import cosine_logits, decode, nearest_patch
from fastmum.geometry.metrics import match_errors, match_scores, pair_epe
from fastmum.geometry.warp import grid_points

sizes = st.integers(1, 7)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (0, (100, 100, 100, 100)),
        (0.5, (100, 100, 100, 100)),
        (2, (100, 0, 100, 100)),
        (4, (100, 0, 0, 100)),
        (31, (100, 0, 0, 0)),
        (33, (0, 0, 0, 0)),
    ],
)
def test_shift_by_pixels_of_448(pixels, expected):
    true = torch.rand(2, 5, 2, dtype=torch.float64)
    moved = true + torch.tensor([0.6, 0.8], dtype=torch.float64) * pixels / 448
    (found,) = match_scores(match_errors(moved, true)[None], torch.ones(2, 5, dtype=torch.bool))
    assert found.epe == pytest.approx(pixels)
    assert (found.robustness, found.pck1, found.pck3, found.pck5) == pytest.approx(expected)


def test_pairs_count_alike_and_hidden_points_not_at_all():
    errors = torch.tensor([[[1.0, 3.0, 1e9], [8.0, 1e9, math.nan], [5.0, 5.0, 5.0]]], dtype=torch.float64)
    visible = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    (found,) = match_scores(errors, visible)
    assert found.epe == pytest.approx((2 + 8) / 2)
    assert found.pairs == 2
    assert pair_epe(errors[0], visible) == [2.0, 8.0, None]


def test_matchers_are_scored_side_by_side():
    errors, visible = 40 * torch.rand(3, 4, 6, dtype=torch.float64), torch.rand(4, 6) > 0.4
    visible[0, 0] = True
    assert match_scores(errors, visible) == [match_scores(each[None], visible)[0] for each in errors]


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="no point is visible"):
        match_scores(torch.zeros(1, 2, 3), torch.zeros(2, 3, dtype=torch.bool))
    (found,) = match_scores(torch.full((1, 1, 2), math.nan), torch.ones(1, 2, dtype=torch.bool))
    assert found.as_dict()["epe"] is None


@settings(deadline=None)
@given(sizes, sizes, st.data())
def test_a_clear_best_patch_is_decoded_to_its_centre(rows, columns, data):
    best = data.draw(st.integers(0, rows * columns - 1))
    logits = torch.zeros(1, rows * columns)
    logits[0, best] = 100
    assert torch.allclose(decode(logits, (rows, columns))[0], grid_points(rows, columns)[best].float(), atol=1e-6)


@settings(deadline=None)
@given(sizes, sizes, st.integers(0, 1000))
def test_decoded_place_is_within_a_patch_of_the_best(rows, columns, seed):
    logits = torch.randn(4, rows * columns, generator=torch.Generator().manual_seed(seed))
    place = decode(logits, (rows, columns))
    away = (place - grid_points(rows, columns).float()[logits.argmax(-1)]).abs()
    assert (away <= torch.tensor([1 / columns, 1 / rows]) + 1e-6).all()
    assert ((place > 0) & (place < 1)).all()


def test_two_equal_neighbours_are_decoded_half_way_and_rows_do_not_wrap():
    logits = torch.full((2, 12), -50.0)
    logits[0, 4] = logits[0, 5] = 0  # second row of a grid of four columns
    logits[1, 3] = logits[1, 4] = 0  # end of one row, beginning of the next: no neighbours
    place = decode(logits, (3, 4))
    assert place[0].tolist() == pytest.approx([0.25, 0.5])
    assert place[1].tolist() == pytest.approx([3.5 / 4, 0.5 / 3])


def test_features_find_themselves():
    features = torch.nn.functional.normalize(torch.randn(2, 20, 64), dim=-1)
    order = torch.randperm(20)
    logits = cosine_logits(features, 3 * features[:, order], 0.01)
    assert torch.equal(order[logits.argmax(-1)], torch.arange(20).expand(2, 20))
    assert logits.max() == pytest.approx(100, rel=1e-5)


@given(sizes, sizes)
def test_patches_hold_their_own_centres(rows, columns):
    assert torch.equal(nearest_patch(grid_points(rows, columns), (rows, columns)), torch.arange(rows * columns))


def test_points_outside_go_to_the_patch_next_to_them():
    points = torch.tensor([[-0.2, 0.1], [1.0, 1.0], [0.4, 7.0]], dtype=torch.float64)
    assert nearest_patch(points, (2, 3)).tolist() == [0, 5, 4]
