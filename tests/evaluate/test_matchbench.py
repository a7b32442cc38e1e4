"""The protocol matchbench: every pixel of 448 x 448, means over batches, and probes that PyTorch trains alike."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plane_world import walk
from test_matching import CPU, GRID, hidden_signal
from torch import nn

from fastmum.evaluate import evaluate_cosine, evaluate_matching, open_pairs
from fastmum.evaluate.__main__ import main
from fastmum.evaluate.features import load_image, patch_features, prepare, true_warps
from fastmum.evaluate.matching import (
    ProbeSettings,
    cosine_logits,
    nearest_patch,
    train_probes,
)
from fastmum.evaluate.pairs import Pair, PairSet, pair_warp
from fastmum.evaluate.records import read
from fastmum.evaluate.scoring import BATCH, score_warps


def test_every_visible_pixel_counts_and_batches_are_averaged():
    """Ten pairs whose numbers of visible pixels differ: a batch of eight and one of two, in a random order."""
    shots = walk(11)
    frames = [shot.frame(f"{i}.png") for i, shot in enumerate(shots)]
    for i in (3, 7):
        frames[i].depth_map[:, 20:] = 0
    pairs = PairSet("wall", [Pair(str(i), "wall", frames[i], frames[i + 1]) for i in range(10)], 64)
    truth = true_warps(pairs, 448, torch.float32)
    assert truth.visible.shape == (10, 448 * 448)
    warps = torch.rand(2, 10, 24, 2, generator=torch.Generator().manual_seed(0))
    scores, by_pair = score_warps(warps, (4, 6), truth, CPU)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    for i in range(2):
        epes, robust = [], []
        for batch in (order[:BATCH], order[BATCH:]):
            errors = []
            for pair in batch:
                fine = F.interpolate(warps[i, pair].T.view(1, 2, 4, 6), (448, 448), mode="bilinear")[0].flatten(1).T
                true = pair_warp(pairs.pairs[pair], 448, 448)
                errors.append(448 * (fine - true.points).norm(dim=1)[true.visible])
                if i == 0:
                    assert by_pair[pair] == pytest.approx(errors[-1].mean().item(), rel=1e-5)
            errors = torch.cat(errors)
            epes.append(errors.mean().item())
            robust.append(100 * (errors < 32).double().mean().item())
        assert (scores[i].epe, scores[i].robustness) == pytest.approx((np.mean(epes), np.mean(robust)), rel=1e-4)
        assert scores[i].pairs == 10
    exact = pair_warp(pairs.pairs[0], 56, 56).points[None, None].expand(1, 10, -1, 2)
    (near,), _ = score_warps(
        exact, (56, 56), replace(truth, visible=truth.visible & (torch.arange(10) == 0)[:, None]), CPU
    )
    assert near.epe < 1  # interpolation between the centres of patches, and their border


def test_probes_are_convolutions_trained_by_adamw():
    """As the author's: bias, PyTorch's first weights, mean loss, one clipping for all, a tenth of the rate at last."""
    train, test = hidden_signal(16, 0), hidden_signal(4, 1)
    rates, decays = (1e-3, 1e-2), (0.01, 0.5)
    settings = ProbeSettings(10, 16, 5, rates, decays, protocol="matchbench")  # all pairs in each step
    history, best, matrix = train_probes(train, test, settings, CPU)
    assert matrix.shape == (33, 32)
    rng = torch.Generator().manual_seed(0)
    first = (2 * torch.rand(4, 33, 32, generator=rng) - 1) / 32**0.5
    convolutions = [nn.Conv2d(32, 32, 1) for _ in range(4)]
    groups = []
    for each, start, (rate, decay) in zip(convolutions, first, settings.probes(), strict=True):
        assert each.weight.abs().max() <= 32**-0.5 >= each.bias.abs().max() > 0.8 * 32**-0.5  # the same range
        each.load_state_dict({"weight": start[:32].T[:, :, None, None], "bias": start[32]})
        lr = rate * 16 / 8  # by the size of the batch
        groups += [
            {"params": [each.weight], "lr": lr, "weight_decay": decay},
            {"params": [each.bias], "lr": lr, "weight_decay": 0.0},
        ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [9])
    a, b = (x.mT.unflatten(2, GRID) for x in train.of(torch.arange(16), CPU))
    target, visible, losses = nearest_patch(train.truth.target, train.truth.grid), train.truth.visible, []
    for _ in range(10):
        logits = [cosine_logits(*(conv(x).flatten(2).mT for x in (a, b))) for conv in convolutions]
        step = torch.stack([F.cross_entropy(each[visible], target[visible]) for each in logits])
        losses.append(step.detach())
        optimizer.zero_grad()
        step.mean().backward()
        nn.utils.clip_grad_norm_([p for conv in convolutions for p in conv.parameters()], 0.01)
        optimizer.step()
        schedule.step()
    for i, evaluation in enumerate(history):
        expected = torch.stack(losses[5 * i : 5 * i + 5]).mean(0).tolist()
        assert evaluation.losses == pytest.approx(expected, rel=1e-3)
    probe, last = best
    chosen = convolutions[probe]
    if last == 1:
        torch.testing.assert_close(matrix[:32], chosen.weight[:, :, 0, 0].T, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(matrix[32], chosen.bias, rtol=1e-2, atol=1e-4)


def test_tokens_before_the_norm_keep_their_length(wall_pairs, tiny):
    data = prepare(tiny.eval(), wall_pairs, 64, ("raw",), scaled=False)["raw"]
    image = load_image(wall_pairs.pairs[0].a, 64)[None]
    raw = patch_features(tiny, image)["raw"]
    torch.testing.assert_close(data.features[:1].float(), raw, rtol=2e-3, atol=2e-3)


def test_evaluations_by_the_protocol(wall_pairs, by_colour):
    settings = ProbeSettings.of("matchbench", steps=4, batch=2, evaluate_every=2, learning_rates=(1e-3,))
    scenes = [replace(pair, scene=str(i)) for i in range(7) for pair in wall_pairs.pairs[:1]]
    train = replace(wall_pairs, pairs=scenes)
    for on_train in (False, True):
        result = evaluate_matching(by_colour, wall_pairs, train, settings, 64, on_train)
        numbers = result.numbers
        assert len(numbers["probes"]) == 3
        assert numbers["settings"]["protocol"] == "matchbench"
        assert numbers["settings"]["train_pairs"] == (5 if on_train else 7)
        if not on_train:
            assert numbers["scores"]["epe"] == pytest.approx(
                min(e["epe"] for p in numbers["probes"] for e in p["evaluations"])
            )
    patches, pixels = (
        evaluate_cosine(by_colour, wall_pairs, 64, protocol=name).numbers for name in ("patches", "matchbench")
    )
    assert (patches["settings"]["protocol"], pixels["settings"]["protocol"]) == ("patches", "matchbench")
    assert patches["scores"]["epe"] != pixels["scores"]["epe"]
    assert pixels["scores"]["epe"] == pytest.approx(patches["scores"]["epe"], rel=0.5)  # both are below half a patch
    assert json.dumps(pixels)


def test_the_command_says_the_protocol(wall_file, tmp_path):
    out = tmp_path / "out"
    common = ["--weights", "random:mum_tiny", "--data", str(wall_file), "--out", str(out)]
    common += ["--size", "64", "--pictures", "0", "--max-pairs", "2"]
    few = ["--steps", "1", "--batch", "2", "--learning-rates", "1e-3"]
    for protocol in ("patches", "matchbench"):
        assert main(["matching", *common, *few, "--protocol", protocol]) == 0
        assert main(["cosine", *common, "--protocol", protocol]) == 0
    assert main(["discriminant", *common]) == 0
    contents = [record.content for record in read(out)]
    found = [(content["task"], content["protocol"], content["settings"]["protocol"]) for content in contents]
    assert sorted(found) == [
        (task, protocol, protocol)
        for task, protocols in (("cosine", ("matchbench", "patches")), ("discriminant", ("patches",)),
                                ("matching", ("matchbench", "patches")))
        for protocol in protocols
    ]  # fmt: skip
    trained = {content["protocol"]: content for content in contents if content["task"] == "matching"}
    assert [len(trained[name]["probes"]) for name in ("patches", "matchbench")] == [3, 3]
    assert trained["patches"]["settings"]["train_pairs"] == trained["matchbench"]["settings"]["train_pairs"] == 4
    assert "matchbench" in (out / "table.md").read_text()


def test_pairs_of_megadepth(tmp_path, monkeypatch):
    """Drawn from all pairs that DKM's files list, even where LoFTR's are there."""
    from test_pair_sets import PAIR_INFOS, megadepth

    monkeypatch.setattr("fastmum.evaluate.pairs.megadepth.MATCHBENCH_PAIRS", 3)
    (tmp_path / "prep_scene_info").mkdir()
    for scene in ("0015", "0022"):
        information = megadepth(tmp_path, scene, walk(5))
        np.savez(tmp_path / f"{scene}_0.1_0.3.npz", **information, pair_infos=PAIR_INFOS)
    loftr = open_pairs(str(tmp_path), "test", matchbench=True)
    assert len(loftr.pairs) == 3
    assert {pair.name for pair in loftr.pairs} < {pair.name for pair in open_pairs(str(tmp_path)).pairs}
    for scene in ("0015", "0022"):
        information = megadepth(tmp_path, scene, walk(5))
        information |= {"pairs": np.array([[1, 2], [2, 3], [1, 3]]), "overlaps": np.array([0.5, 0.005, 0.0])}
        np.save(tmp_path / "prep_scene_info" / f"{scene}.npy", information)
    names = [pair.name for pair in open_pairs(f"megadepth:{tmp_path}", "all", matchbench=True).pairs]
    assert len(names) == 3
    assert set(names) < {f"{scene}/{pair}" for scene in ("0015", "0022") for pair in ("1-2", "2-3")}
