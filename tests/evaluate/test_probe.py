"""Probes trained together equal probes trained separately, and learn the hidden signal."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastmum.evaluate.features import Prepared, Truth
from fastmum.evaluate.matcher import cosine_logits, nearest_patch
from fastmum.evaluate.matching import cosine_warps
from fastmum.evaluate.pairs import PairSet
from fastmum.evaluate.probe import BatchedAdamW, ProbeSettings, match_all, matching_losses, project, train_probes
from fastmum.geometry.metrics import match_errors, match_scores
from fastmum.geometry.warp import grid_points

CPU = torch.device("cpu")
GRID = (5, 6)


def hidden_signal(wall: PairSet, pairs: int, seed: int) -> Prepared:
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
    return Prepared(Truth(wall, torch.stack(targets), visible, GRID), torch.stack(features), first, first + 1)


@pytest.fixture
def data(wall_pairs):
    return hidden_signal(wall_pairs, 40, 0), hidden_signal(wall_pairs, 10, 1)


def epe(data, stack):
    errors, _ = match_all(stack, data, ProbeSettings(), CPU)
    return [each.epe for each in match_scores(errors, data.truth.visible)]


def test_a_probe_beats_random_projections_and_cosine_matching(data):
    train, test = data
    settings = ProbeSettings(steps=200, evaluate_every=50, learning_rates=(1e-5, 1e-2), weight_decays=(0.0, 0.1))
    trained = train_probes(train, test, settings, CPU, progress=False)
    (error,) = match_scores(match_errors(trained.warps, test.truth.target)[None], test.truth.visible)
    random = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(5))
    chance = epe(test, random)
    plain = match_scores(match_errors(cosine_warps(test, 0.1, CPU), test.truth.target)[None], test.truth.visible)[0].epe
    assert error.epe < 0.3 * min(*chance, plain)
    assert settings.probes()[trained.best[0]][0] == 1e-2
    # The reported error is the minimum over all evaluations, and the kept warps reproduce it.
    history = [each.scores[i].epe for each in trained.history for i in range(4)]
    assert error.epe == pytest.approx(min(history))
    assert [each.step for each in trained.history] == [50, 100, 150, 200]
    assert trained.history[-1].losses[2] < trained.history[0].losses[2]


def test_probes_trained_together_equal_separate_ones(data):
    train, test = data
    rates, decays = (1e-3, 1e-2), (0.0, 0.5)
    common = {"steps": 7, "evaluate_every": 3, "batch": 4}
    together = train_probes(
        train, test, ProbeSettings(**common, learning_rates=rates, weight_decays=decays), CPU, progress=False
    )
    assert [each.step for each in together.history] == [3, 6, 7]
    for i, (rate, decay) in enumerate((rate, decay) for rate in rates for decay in decays):
        alone = train_probes(
            train, test, ProbeSettings(**common, learning_rates=(rate,), weight_decays=(decay,)), CPU, progress=False
        )
        for one, all_ in zip(alone.history, together.history, strict=True):
            assert one.losses[0] == pytest.approx(all_.losses[i], rel=1e-4)
            assert one.scores[0].epe == pytest.approx(all_.scores[i].epe, rel=1e-2)


def test_batched_adamw_is_adamw():
    stack = torch.randn(3, 4, 5, dtype=torch.float64)
    rates, decays = [1e-3, 1e-2, 0.1], [0.0, 0.3, 1.0]
    ours = BatchedAdamW(stack.clone(), rates, decays)
    params = [torch.nn.Parameter(each.clone()) for each in stack]
    theirs = [torch.optim.AdamW([p], lr=r, weight_decay=w) for p, r, w in zip(params, rates, decays, strict=True)]
    for _ in range(12):
        gradient = torch.randn_like(stack)
        ours.step(gradient)
        for parameter, optimizer, each in zip(params, theirs, gradient, strict=True):
            parameter.grad = each.clone()
            optimizer.step()
        assert torch.allclose(ours.stack, torch.stack([p.detach() for p in params]), rtol=1e-9, atol=1e-12)


def test_loss_is_cross_entropy_over_visible_patches():
    logits, target = torch.randn(2, 3, 7, 9, dtype=torch.float64), torch.randint(0, 9, (3, 7))
    visible = torch.rand(3, 7) > 0.4
    visible[0, 0] = True
    expected = [F.cross_entropy(each[visible], target[visible]) for each in logits]
    assert torch.allclose(matching_losses(logits, target, visible), torch.stack(expected))


def test_identity_is_cosine_matching(data):
    _, test = data
    a, b = test.of(torch.arange(3), CPU)
    stack = torch.eye(32)[None]
    assert torch.allclose(cosine_logits(project(stack, a), project(stack, b))[0], cosine_logits(a, b), atol=1e-5)
    right = nearest_patch(test.truth.target, GRID)
    assert torch.equal(grid_points(*GRID)[right], test.truth.target)


def test_divergence_is_an_error(data):
    train, test = data
    broken = replace(train, features=train.features * math.nan)
    settings = ProbeSettings(steps=2, evaluate_every=1, learning_rates=(1e-3,), weight_decays=(0.0,))
    with pytest.raises(FloatingPointError, match="diverged"):
        train_probes(broken, test, settings, CPU, progress=False)


def test_invalid_settings():
    for wrong, message in (
        ({"steps": 0}, "steps is 0"),
        ({"learning_rates": ()}, "learning_rates"),
        ({"learning_rates": (0.0,)}, "positive"),
        ({"weight_decays": (-0.1,)}, "at least 0"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            ProbeSettings(**wrong)
