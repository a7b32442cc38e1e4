"""Cosine matching, and recall on objects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from plane_world import shot

from fastmum.data.errors import DataError
from fastmum.evaluate import evaluate_cosine, evaluate_matching
from fastmum.evaluate.features import load_image, patch_features, prepare
from fastmum.evaluate.pairs import Pair, PairSet, pair_warp
from fastmum.evaluate.probe import ProbeSettings
from fastmum.evaluate.recall import best_matches, object_recall
from fastmum.geometry.warp import grid_points


def test_features_of_an_encoder_and_of_one_with_registers(tiny, by_colour):
    images = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    known = tiny.eval().forward_features(images)
    ours = patch_features(tiny, images)
    assert torch.allclose(ours["layernorm"], known["x_norm_patchtokens"], atol=1e-5)
    assert torch.allclose(ours["raw"], known["x_prenorm"][:, 1:], atol=1e-5)
    ours = patch_features(by_colour, images)
    assert torch.equal(ours["raw"], ours["layernorm"])


def test_prepared_sets_read_each_frame_once(wall_pairs, by_colour):
    data = prepare(by_colour, wall_pairs.both_ways(), 64, progress=False)["raw"]
    assert data.features.shape == (6, 256, 64)
    assert data.truth.grid == (16, 16)
    assert data.first.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert data.second.tolist() == [1, 0, 2, 1, 3, 2, 4, 3, 5, 4]
    warp = pair_warp(wall_pairs.pairs[1], 16, 16)
    assert torch.equal(data.truth.target[2], warp.points)
    assert torch.equal(data.truth.visible[2], warp.visible)
    # A token's length is taken away, its direction stays.
    features = patch_features(by_colour, load_image(wall_pairs.pairs[0].a, 64)[None])["raw"]
    assert torch.cosine_similarity(features, data.features[:1].float(), dim=-1).min() > 0.999


def counted(encoder, monkeypatch):
    """Numbers of pictures that the encoder is given from now on."""
    seen, forward = [], encoder.forward_features
    monkeypatch.setattr(encoder, "forward_features", lambda images: seen.append(len(images)) or forward(images))
    return seen


def test_both_norms_are_of_one_pass(wall_pairs, tiny, by_colour, monkeypatch):
    tiny.eval()
    seen = counted(tiny, monkeypatch)
    data = prepare(tiny, wall_pairs, 32, progress=False)
    assert list(data) == ["layernorm", "raw"]
    assert not torch.equal(data["layernorm"].features, data["raw"].features)
    assert list(prepare(tiny, wall_pairs, 32, ("raw",), progress=False)) == ["raw"]
    assert seen == [6, 6]
    evaluate_cosine(tiny, wall_pairs, 32, progress=False)
    assert seen[2:] == [6]
    seen = counted(by_colour, monkeypatch)
    evaluate_cosine(by_colour, object_pairs(), 64, progress=False)
    assert seen == [2, 2]  # a pair at a time


def test_features_by_place_match_and_others_do_not(wall_pairs, by_colour):
    result = evaluate_cosine(by_colour, wall_pairs, 64, progress=False)
    numbers = result.numbers
    assert numbers["scores"]["epe"] < 16  # half a patch: 28 pixels of 448 a patch
    assert numbers["scores"]["robustness"] > 95
    assert numbers["best"] in ("layernorm", "raw")
    assert numbers["layernorm"] == numbers["raw"]  # this encoder has no norm
    assert set(numbers["per_pair_epe"]) == {pair.name for pair in wall_pairs.pairs}
    assert np.mean(list(numbers["per_pair_epe"].values())) == pytest.approx(numbers["scores"]["epe"])
    assert result.warps.shape == (5, 256, 2)
    moves = [pair_warp(pair, 16, 16) for pair in wall_pairs.pairs]
    still = [(warp.points - grid_points(16, 16)).norm(dim=1)[warp.visible].mean().item() * 448 for warp in moves]
    assert numbers["no_motion"]["epe"] == pytest.approx(np.mean(still))
    with torch.no_grad():
        by_colour.waves.zero_()  # every patch alike
    assert evaluate_cosine(by_colour, wall_pairs, 64, progress=False).numbers["scores"]["epe"] > 80


def test_a_probe_sees_through_noise(wall_pairs, by_colour):
    by_colour.noise = 2.0
    test = PairSet("wall", wall_pairs.pairs[:2], 64)
    train = PairSet("wall", wall_pairs.pairs[2:], 64)
    settings = ProbeSettings(steps=60, evaluate_every=20, learning_rates=(1e-3, 1e-2), weight_decays=(0.0,))
    numbers = evaluate_matching(by_colour, test, train, settings, 64, progress=False).numbers
    plain = evaluate_cosine(by_colour, test, 64, progress=False).numbers
    assert numbers["scores"]["epe"] < 0.5 * plain["scores"]["epe"]
    assert len(numbers["probes"]) == 2
    least = min(each["epe"] for probe in numbers["probes"] for each in probe["evaluations"])
    assert numbers["scores"]["epe"] == pytest.approx(least)


def object_pairs(count: int = 2) -> PairSet:
    """The wall at a tenth of its distance, metres, seen through a window."""
    shots = [shot((0.4 * i, 0.1 * i, 0.2), (0.02, -0.05 * i, 0.04 * i), (64, 64), 70) for i in range(count + 1)]

    frames = []
    for i, camera in enumerate(shots):
        depth, pose = camera.depth() / 10, camera.T.copy()
        depth[:, :12] = depth[:, 52:] = 0
        pose[:3, 3] /= 10
        frames.append(replace(camera.frame(str(i)), depth_map=depth, camera_from_world=pose))
    return PairSet("navi", [Pair(f"{i}", "object", *frames[i : i + 2]) for i in range(count)], 64, objects=True)


def test_recall_of_features_by_place(by_colour):
    pairs = object_pairs()
    recalls = object_recall(by_colour, pairs, 64, progress=False)
    scores = recalls["layernorm"]
    assert recalls["raw"] == scores  # this encoder has no norm
    assert scores["recall_5cm"] > 85  # some points are outside of the other window
    assert 0 < scores["recall_1cm"] < scores["recall_2cm"] < scores["recall_5cm"]  # cells are 2.3 cm wide
    assert scores["recall"] == pytest.approx(np.mean([scores[f"recall_{n}cm"] for n in (1, 2, 5)]))
    numbers = evaluate_cosine(by_colour, pairs, 64, progress=False).numbers
    assert numbers["scores"] == scores
    with torch.no_grad():
        by_colour.waves.zero_()
    assert object_recall(by_colour, pairs, 64, progress=False)["layernorm"]["recall_5cm"] < 50


def test_best_matches_are_those_that_stand_out():
    b = torch.eye(6)
    a = torch.stack([b[4], (b[1] + b[2]) / 2, b[0] + 0.1 * b[3]])
    first, second = best_matches(a, b, 2)
    assert first.tolist() == [0, 2]
    assert second.tolist() == [4, 0]
    first, second = best_matches(a, b, 100)
    assert sorted(first.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("size", [30, -4])
def test_sizes_that_do_not_fit(wall_pairs, by_colour, size):
    with pytest.raises(DataError, match="multiple of the patch size 4"):
        prepare(by_colour, wall_pairs, size, progress=False)


def test_features_that_are_not_finite(wall_pairs, by_colour):
    with torch.no_grad():
        by_colour.waves.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        prepare(by_colour, wall_pairs, 64, progress=False)


def test_a_set_without_common_points(wall_pairs, by_colour):
    pair = wall_pairs.pairs[0]
    turned = np.diag([-1, 1, -1, 1]) @ pair.b.camera_from_world
    away = replace(pair, b=replace(pair.b, camera_from_world=turned))
    with pytest.raises(DataError, match="no patch of the set 'wall' is visible in both views"):
        prepare(by_colour, PairSet("wall", [away], 64), 64, progress=False)
