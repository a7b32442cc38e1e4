"""The matcher, scores of warps, cosine matching, recall on objects, and probes."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plane_world import shot

from fastmum.data.errors import DataError
from fastmum.evaluate import evaluate_cosine, evaluate_matching
from fastmum.evaluate.features import Prepared, Truth, load_image, patch_features, prepare
from fastmum.evaluate.matching import (
    ProbeSettings,
    cosine_logits,
    decode,
    discriminant,
    leave_out,
    match_pairs,
    nearest_patch,
    train_probes,
)
from fastmum.evaluate.pairs import Pair, PairSet, pair_warp
from fastmum.evaluate.recall import best_matches, object_recall
from fastmum.geometry.metrics import match_errors, match_scores, pair_epe
from fastmum.geometry.warp import grid_points

CPU = torch.device("cpu")
GRID = (5, 6)


def test_shift_by_pixels_of_448():
    true, direction = torch.rand(2, 5, 2, dtype=torch.float64), torch.tensor([0.6, 0.8], dtype=torch.float64)
    for pixels in (0.5, 2, 4, 31, 33):
        moved = true + direction * pixels / 448
        (found,) = match_scores(match_errors(moved, true)[None], torch.ones(2, 5, dtype=torch.bool))
        shares = found.pck1, found.pck3, found.pck5, found.robustness
        assert found.epe == pytest.approx(pixels)
        assert shares == tuple(100 * (pixels < bound) for bound in (1, 3, 5, 32))


def test_pairs_count_alike_and_hidden_points_not_at_all():
    errors = torch.tensor([[[1.0, 3.0, 1e9], [8.0, 1e9, math.nan], [5.0, 5.0, 5.0]]], dtype=torch.float64)
    visible = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    (found,) = match_scores(errors, visible)
    assert (found.epe, found.pairs) == ((2 + 8) / 2, 2)
    assert pair_epe(errors[0], visible) == [2.0, 8.0, None]
    both = torch.cat([errors, 2 * errors])
    assert [each.epe for each in match_scores(both, visible)] == [5, 10]
    with pytest.raises(ValueError, match="no point is visible"):
        match_scores(errors, torch.zeros_like(visible))
    (found,) = match_scores(torch.full((1, 1, 2), math.nan), torch.ones(1, 2, dtype=torch.bool))
    assert found.as_dict()["epe"] is None


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 1000))
def test_decoded_place_is_within_a_patch_of_the_best(rows, columns, seed):
    centres = grid_points(rows, columns).float()
    logits = torch.randn(4, rows * columns, generator=torch.Generator().manual_seed(seed))
    place, best = decode(logits, (rows, columns)), centres[logits.argmax(-1)]
    assert ((place - best).abs() <= torch.tensor([1 / columns, 1 / rows]) + 1e-6).all()
    assert ((place > 0) & (place < 1)).all()
    clear = torch.where(logits == logits.amax(-1, keepdim=True), 100, logits)
    assert torch.allclose(decode(clear, (rows, columns)), best, atol=1e-6)


def test_two_equal_neighbours_are_decoded_half_way_and_rows_do_not_wrap():
    logits = torch.full((2, 12), -50.0)
    logits[0, 4] = logits[0, 5] = 0  # second row of a grid of four columns
    logits[1, 3] = logits[1, 4] = 0  # end of one row, beginning of the next: no neighbours
    assert torch.allclose(decode(logits, (3, 4)), torch.tensor([[0.25, 0.5], [3.5 / 4, 0.5 / 3]]))


def test_nearest_patches():
    for grid in itertools.product(range(1, 8), repeat=2):
        assert torch.equal(nearest_patch(grid_points(*grid), grid), torch.arange(grid[0] * grid[1]))
    outside = torch.tensor([[-0.2, 0.1], [1.0, 1.0], [0.4, 7.0]], dtype=torch.float64)
    assert nearest_patch(outside, (2, 3)).tolist() == [0, 5, 4]


def test_features_of_an_encoder(tiny):
    images = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    known, ours = tiny.eval().forward_features(images), patch_features(tiny, images)
    assert torch.allclose(ours["layernorm"], known["x_norm_patchtokens"], atol=1e-5)
    assert torch.allclose(ours["raw"], known["x_prenorm"][:, 1:], atol=1e-5)


def test_prepared_sets_read_each_frame_once(wall_pairs, by_colour):
    data = prepare(by_colour, wall_pairs.both_ways(), 64)["raw"]
    assert data.features.shape == (6, 256, 64)
    assert data.truth.grid == (16, 16)
    assert data.first.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert data.second.tolist() == [1, 0, 2, 1, 3, 2, 4, 3, 5, 4]
    warp = pair_warp(wall_pairs.pairs[1], 16, 16)
    assert torch.equal(data.truth.target[2], warp.points)
    assert torch.equal(data.truth.visible[2], warp.visible)
    # Tokens are scaled to one length and keep their direction.
    features = patch_features(by_colour, load_image(wall_pairs.pairs[0].a, 64)[None])["raw"]
    assert torch.cosine_similarity(features, data.features[:1].float(), dim=-1).min() > 0.999
    assert torch.allclose(data.features.float().square().mean(-1), torch.tensor(1.0), atol=1e-2)


def test_both_norms_are_of_one_pass(wall_pairs, tiny, by_colour, monkeypatch):
    for encoder, pairs, expected in ((tiny.eval(), wall_pairs, [6]), (by_colour, object_pairs(), [2, 2])):
        seen, forward = [], encoder.forward_features
        monkeypatch.setattr(encoder, "forward_features", lambda x, *, s=seen, f=forward: s.append(len(x)) or f(x))
        numbers = evaluate_cosine(encoder, pairs, 64).numbers
        assert seen == expected  # all frames of scenes; of objects, a pair at a time
        assert (numbers["layernorm"] == numbers["raw"]) == (encoder is by_colour)  # which has no norm


def test_features_by_place_match_and_others_do_not(wall_pairs, by_colour):
    result = evaluate_cosine(by_colour, wall_pairs, 64)
    numbers = result.numbers
    assert numbers["scores"]["epe"] < 16  # half a patch: 28 pixels of 448 a patch
    assert numbers["scores"]["robustness"] > 95
    assert list(numbers["per_pair_epe"]) == [pair.name for pair in wall_pairs.pairs]
    assert np.mean(list(numbers["per_pair_epe"].values())) == pytest.approx(numbers["scores"]["epe"])
    assert result.warps.shape == (5, 256, 2)
    moves = [pair_warp(pair, 16, 16) for pair in wall_pairs.pairs]
    still = [(warp.points - grid_points(16, 16)).norm(dim=1)[warp.visible].mean().item() * 448 for warp in moves]
    assert numbers["no_motion"]["epe"] == pytest.approx(np.mean(still))
    with torch.no_grad():
        by_colour.waves.zero_()  # every patch alike
    assert evaluate_cosine(by_colour, wall_pairs, 64).numbers["scores"]["epe"] > 80


def object_pairs() -> PairSet:
    """Two pairs of the wall at a tenth of its distance, metres, seen through a window."""
    frames = []
    for i in range(3):
        camera = shot((0.4 * i, 0.1 * i, 0.2), (0.02, -0.05 * i, 0.04 * i), (64, 64), 70)
        depth, pose = camera.depth() / 10, camera.T.copy()
        depth[:, :12] = depth[:, 52:] = 0
        pose[:3, 3] /= 10
        frames.append(replace(camera.frame(str(i)), depth_map=depth, camera_from_world=pose))
    return PairSet("navi", [Pair(f"{i}", "object", *frames[i : i + 2]) for i in range(2)], 64, objects=True)


def test_recall_of_features_by_place(by_colour):
    pairs = object_pairs()
    scores = evaluate_cosine(by_colour, pairs, 64).numbers["scores"]
    assert scores["recall_5cm"] > 85  # some points are outside of the other window
    with pytest.raises(DataError, match="--protocol"):
        evaluate_cosine(by_colour, pairs, 64, protocol="matchbench")
    assert 0 < scores["recall_1cm"] < scores["recall_2cm"] < scores["recall_5cm"]  # cells are 2.3 cm wide
    assert scores["recall"] == pytest.approx(np.mean([scores[f"recall_{n}cm"] for n in (1, 2, 5)]))
    with torch.no_grad():
        by_colour.waves.zero_()
    assert object_recall(by_colour, pairs, 64)["layernorm"]["recall_5cm"] < 50


def test_best_matches_are_those_that_stand_out():
    b = torch.eye(6)
    a = torch.stack([b[4], (b[1] + b[2]) / 2, b[0] + 0.1 * b[3]])
    first, second = best_matches(a, b, 2)
    assert (first.tolist(), second.tolist()) == ([0, 2], [4, 0])
    assert sorted(best_matches(a, b, 100)[0].tolist()) == [0, 1, 2]


def test_sets_and_encoders_that_do_not_fit(wall_pairs, by_colour):
    pair = wall_pairs.pairs[0]
    turned = np.diag([-1, 1, -1, 1]) @ pair.b.camera_from_world
    away = PairSet("wall", [replace(pair, b=replace(pair.b, camera_from_world=turned))], 64)
    for pairs, size, message in ((wall_pairs, 30, "--size"), (wall_pairs, -4, "--size"), (away, 64, "'wall'")):
        with pytest.raises(DataError, match=message):
            prepare(by_colour, pairs, size)
    with torch.no_grad():
        by_colour.waves.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        prepare(by_colour, wall_pairs, 64)


def hidden_signal(pairs: int, seed: int) -> Prepared:
    """B is a permutation of A's patches; 8 of 32 channels identify a patch, the others are louder noise."""
    rng = torch.Generator().manual_seed(seed)
    patches = GRID[0] * GRID[1]
    mix = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(99)))[0]
    features, targets = [], []
    for _ in range(pairs):
        signal, order = torch.randn(patches, 8, generator=rng), torch.randperm(patches, generator=rng)
        for each in (signal, signal[order]):
            features.append(torch.cat([each, 3 * torch.randn(patches, 24, generator=rng)], 1) @ mix)
        targets.append(grid_points(*GRID)[order.argsort()])
    visible = torch.rand(pairs, patches, generator=rng) > 0.2
    first = torch.arange(0, 2 * pairs, 2)
    return Prepared(Truth(None, torch.stack(targets), visible, GRID), torch.stack(features), first, first + 1)


def epe(data, warps):
    return [each.epe for each in match_scores(match_errors(warps, data.truth.target), data.truth.visible)]


def test_a_probe_beats_cosine_matching():
    train, test = hidden_signal(40, 0), hidden_signal(10, 1)
    settings = ProbeSettings(steps=200, evaluate_every=50, learning_rates=(1e-5, 1e-2), weight_decays=(0.0, 0.1))
    trained = train_probes(train, test, settings, CPU)
    (error,) = epe(test, match_pairs(test, 8, 0.1, CPU, trained.matrix[None]))
    assert error < 0.3 * epe(test, match_pairs(test, 8, 0.1, CPU)[None])[0]
    probe, evaluation = trained.best
    assert settings.probes()[probe][0] == 1e-2
    # The reported error is the minimum over all evaluations, and the kept probe reproduces it.
    assert error == pytest.approx(min(each.scores[i].epe for each in trained.history for i in range(4)))
    assert error == pytest.approx(trained.history[evaluation].scores[probe].epe)


def test_left_out_scenes_are_not_trained_on(wall_pairs, by_colour):
    pairs = [replace(pair, scene=str(i)) for i in range(12) for pair in wall_pairs.pairs[:3]]
    train = replace(wall_pairs, pairs=pairs)
    kept, left = leave_out(train)
    assert [{pair.scene for pair in part.pairs} for part in (kept, left)][1] == {"0", "6"}
    assert (len(kept.pairs), len(left.pairs)) == (30, 6)
    assert not {pair.scene for pair in kept.pairs} & {pair.scene for pair in left.pairs}
    numbers = evaluate_matching(by_colour, wall_pairs, train, ProbeSettings(4, 2, 2), choose_on_train=True).numbers
    alone = evaluate_matching(by_colour, left, kept, ProbeSettings(4, 2, 2)).numbers
    assert (numbers["settings"]["train_pairs"], numbers["best"]) == (30, alone["best"])
    assert numbers["scores"]["pairs"] == 5
    with pytest.raises(DataError, match="wall"):
        leave_out(wall_pairs)


def test_the_discriminant_makes_differences_of_matches_white():
    train, test = hidden_signal(40, 0), hidden_signal(10, 1)
    (error,) = epe(test, match_pairs(test, 8, 0.1, CPU, discriminant(train, CPU)[None]))
    assert error < 0.3 * epe(test, match_pairs(test, 8, 0.1, CPU)[None])[0]
    noisy = replace(train, features=train.features + 0.1 * torch.randn(train.features.shape) + 5)
    probe = discriminant(noisy, CPU, shrinkage=0.0)
    a, b = (x @ probe for x in noisy.of(torch.arange(40), CPU))
    target = nearest_patch(noisy.truth.target, GRID)[..., None].expand_as(a)
    difference = (a - b.gather(1, target))[noisy.truth.visible]
    covariance = difference.T @ difference / len(difference)
    values = torch.linalg.eigvalsh(covariance)  # the direction of the mean is removed
    torch.testing.assert_close(values, torch.ones(32).index_fill(0, torch.tensor(0), 0.0), rtol=1e-2, atol=1e-2)
    assert torch.cat([a, b]).mean((0, 1)).norm() < 0.1


def test_probes_are_matrices_trained_by_adamw():
    train, test = hidden_signal(40, 0), hidden_signal(10, 1)
    settings = ProbeSettings(7, 40, 3, learning_rates=(1e-3, 1e-2), weight_decays=(0.0, 0.5))  # all pairs in each step
    history = train_probes(train, test, settings, CPU).history
    assert [each.step for each in history] == [3, 6, 7]
    a, b = train.of(torch.arange(40), CPU)
    target = nearest_patch(train.truth.target, GRID)
    assert torch.equal(grid_points(*GRID)[target], train.truth.target)
    for i, (rate, decay) in enumerate(((1e-3, 0.0), (1e-3, 0.5), (1e-2, 0.0), (1e-2, 0.5))):
        matrix, losses = torch.nn.Parameter(torch.eye(32)), []
        optimizer = torch.optim.AdamW([matrix], lr=rate, weight_decay=decay)
        for _ in range(7):
            logits, visible = cosine_logits(a @ matrix, b @ matrix), train.truth.visible
            loss = F.cross_entropy(logits[visible], target[visible])
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        expected = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
        assert [each.losses[i] for each in history] == pytest.approx(expected, rel=1e-4)
        (error,) = epe(test, match_pairs(test, 8, 0.1, CPU, matrix.detach()[None]))
        assert history[-1].scores[i].epe == pytest.approx(error, rel=1e-2)


def test_divergence_and_invalid_settings_are_errors():
    test = hidden_signal(10, 1)
    broken = replace(test, features=test.features * math.nan)
    settings = ProbeSettings(steps=2, evaluate_every=1, learning_rates=(1e-3,), weight_decays=(0.0,))
    with pytest.raises(FloatingPointError):
        train_probes(broken, test, settings, CPU)
    wrong = {"steps": [0], "learning_rates": [(), (0.0,)], "weight_decays": [(), (-0.1,)], "temperature": [0.0]}
    for name, value in ((name, value) for name, values in wrong.items() for value in values):
        with pytest.raises(ValueError, match=name):
            ProbeSettings(**{name: value})
