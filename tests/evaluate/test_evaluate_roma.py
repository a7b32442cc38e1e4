"""Evaluation of matching: the truth scores perfectly, poses of essential matrices, failures, the command."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plane_world import exact, shot, walk
from roma_runs import train_tiny
from test_pair_sets import PAIR_INFOS, megadepth

from fastmum.evaluate import commands, roma
from fastmum.evaluate.__main__ import main
from fastmum.evaluate.pairs import Pair, PairSet, scenes
from fastmum.scenes import ensure_scenes, scene_dirs
from fastmum.tasks.roma.coarse import grid
from fastmum.tasks.roma.infer import Warps


@pytest.fixture
def rendered() -> PairSet:
    """Pairs of a room, whose relative pose a plane would not determine."""
    folders = scene_dirs(ensure_scenes(count=3, views=6, size=64, progress=False), 3)
    return scenes.from_folders(folders[:1], gaps=(2,), starts=2)


def oracle(pairs: PairSet, shift: float = 0.0):
    """`passes` with the true warps, moved by a share of the image."""
    rest = [*pairs.pairs]

    def passes(trained, a, b, size=None):
        pair = rest.pop(0)
        ways = [roma.truth_of(each, 64) for each in (pair, pair.reversed())]
        points = torch.cat([way.points for way in ways]).permute(0, 2, 3, 1) + shift
        return itertools.repeat(Warps(points, torch.cat([way.visible for way in ways]).float()), 2)

    return passes


def test_the_truth_scores_perfectly_and_a_shift_by_its_length(monkeypatch, rendered):
    pytest.importorskip("cv2")
    monkeypatch.setattr(roma, "passes", oracle(rendered))
    monkeypatch.setattr(roma, "MATCHES", 500)
    run = SimpleNamespace(image_size=64)
    found = roma.evaluate_roma(run, rendered, pictures=rendered.pairs[:1])
    scores = found.numbers["scores"]
    assert scores["epe"] < 1e-4
    assert scores["pck1"] == 100
    assert scores["auc5"] > 60
    assert scores["auc5"] < scores["auc10"] < scores["auc20"]
    assert len(found.pictures) == 1
    monkeypatch.setattr(roma, "passes", oracle(rendered, shift=0.125))
    scores = roma.evaluate_roma(run, PairSet("set", rendered.pairs[:1]), pose=False).numbers["scores"]
    assert scores["epe"] == pytest.approx(4 * 2**0.5, rel=1e-4)
    assert (scores["pck5"], scores.get("auc5")) == (0, None)


def test_poses_of_points_of_known_cameras_and_of_too_few(monkeypatch):
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    a, b = shot(), shot((0.5, -0.2, 0.1), (0.05, -0.1, 0.02))
    points = rng.uniform((-2, -2, 2), (2, 2, 6), (200, 3))
    seen = []
    for camera in (a, b):
        projected = (points @ camera.T[:3, :3].T + camera.T[:3, 3]) @ camera.K.T
        seen.append(projected[:, :2] / projected[:, 2:])
    R, t = roma.essential_pose(cv2, *seen, a.K, b.K)
    assert np.allclose(R, b.T[:3, :3], atol=1e-5)
    assert np.allclose(t, b.T[:3, 3] / np.linalg.norm(b.T[:3, 3]), atol=1e-4)
    assert roma.essential_pose(cv2, seen[0][:4], seen[1][:4], a.K, b.K) is None
    # No certain match at all counts as 90 degrees, as does any direction where the true translation is zero.
    pair = Pair("pair", "scene", a.frame("a"), b.frame("b"))
    nothing = Warps(torch.zeros(2, 8, 8, 2), torch.zeros(2, 8, 8))
    images = [np.asarray(each.image()) for each in (a, b)]
    assert roma.pose_errors(cv2, nothing, pair, images, torch.Generator()) == [90.0] * 5

    def failing(*args):
        raise cv2.error("no solution")

    monkeypatch.setattr(roma, "essential_pose", failing)
    assert roma.pose_errors(cv2, nothing, pair, images, torch.Generator()) == [90.0] * 5
    principal = []
    monkeypatch.setattr(roma, "essential_pose", lambda cv2, p, q, K, L: principal.append(K[:2, 2]))
    for _, _, centre in (roma.DEFAULT_SIDE, roma.SIDES["scannet"]):  # ScanNet's counts centres at integers
        roma.pose_errors(cv2, nothing, pair, images, torch.Generator(), (min, min(images[0].shape[:2]), centre))
    assert np.allclose(principal[0], a.K[:2, 2])
    assert np.allclose(principal[-1], a.K[:2, 2] + 0.5)
    monkeypatch.setattr(roma, "essential_pose", lambda *args: (np.eye(3), np.ones(3)))
    still = Pair("pair", "scene", a.frame("a"), a.frame("a"))
    assert roma.pose_errors(cv2, nothing, still, images, torch.Generator()) == [90.0] * 5


def test_true_warps_of_the_set_are_those_of_the_wall():
    a, b = shot(), shot((0.3, 0.1, 0.1), (0.02, -0.03, 0.05))
    found = roma.truth_of(Pair("pair", "scene", a.frame("a"), b.frame("b")), 32)
    points = ((grid((32, 32))[0].flatten(1).T.double() + 1) / 2).numpy()
    expected = torch.from_numpy(2 * exact(a, b, points) - 1).T.view(2, 32, 32)
    seen = found.visible[0]
    assert seen.float().mean() > 0.5
    assert (found.points[0] - expected)[:, seen].abs().max() < 5e-3  # depth is interpolated


def test_the_dense_benchmark_has_random_pairs_of_dkm(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmum.evaluate.pairs.megadepth.MATCHBENCH_PAIRS", 2)
    (tmp_path / "prep_scene_info").mkdir()
    for scene in ("0015", "0022"):
        information = megadepth(tmp_path, scene, walk(5))
        np.savez(tmp_path / f"{scene}_0.1_0.3.npz", **information, pair_infos=PAIR_INFOS)
        information |= {"pairs": np.array([[1, 3], [1, 4]]), "overlaps": np.array([0.5, 0.5])}
        np.save(tmp_path / "prep_scene_info" / f"{scene}.npy", information)
    seen, pose = {}, []

    def evaluate(trained, pairs, size, with_pose, few, seed):
        seen[pairs.name] = {pair.name for pair in pairs.pairs}
        pose.append(with_pose)
        return SimpleNamespace(numbers={}, pictures=[])

    monkeypatch.setattr(commands, "evaluate_roma", evaluate)
    for word in ("megadepth", "megadepth_dense"):
        args = SimpleNamespace(data=f"{word}:{tmp_path}", size=None, max_pairs=None, pictures=0, no_pose=False, seed=0)
        assert commands.EVALUATIONS["roma"][1](args, None, lambda name: None).set == word
    assert pose == [True, False]
    assert len(seen["megadepth_dense"]) == 2
    assert seen["megadepth_dense"] <= {f"{scene}/1-{i}" for scene in ("0015", "0022") for i in (3, 4)}
    assert seen["megadepth_dense"].isdisjoint(seen["megadepth"])


@pytest.mark.slow
def test_the_command_writes_results_next_to_others(tmp_path):
    run = train_tiny(tmp_path / "run")
    folder = ensure_scenes(count=3, views=6, size=64, progress=False)
    out = tmp_path / "out"
    words = ["roma", "--weights", str(run), "--data", str(folder), "--max-pairs", "2", "--pictures", "1", "--no-pose"]
    assert main([*words, "--out", str(out)]) == 0
    (file,) = out.glob("*.json")
    content = json.loads(file.read_text())
    assert content["scores"].keys() == {"epe", "pck1", "pck3", "pck5"}
    assert (out / "report.html").exists()
    assert "PCK@5" in (out / "table.md").read_text()
