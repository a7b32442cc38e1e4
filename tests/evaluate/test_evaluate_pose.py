"""Evaluation of relative pose: the truth scores perfectly, wrong poses by hand, pair lists, the command."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from pose_runs import train_tiny

from fastmum.errors import FastmumError
from fastmum.evaluate.__main__ import main
from fastmum.evaluate.pairs import Pair, PairSet, open_pairs
from fastmum.evaluate.pose import evaluate_pose
from fastmum.geometry.camera import rigid_inverse


@pytest.fixture
def wall_set(wall_file) -> PairSet:
    return open_pairs(str(wall_file))


def oracle(pairs: PairSet, change=lambda R, t: (R, t)):
    """Predicts the true poses of a set in its order, after a change."""
    rest = list(pairs.pairs)

    def predict(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert images.dtype == np.uint8
        assert images.shape[1:] == (2, 32, 32, 3)
        true = np.stack([rigid_inverse(rest.pop(0).T_b_a) for _ in images])
        return change(true[:, :3, :3], 7 * true[:, :3, 3])

    return predict


def test_the_truth_scores_perfectly_and_other_poses_do_not(wall_set):
    found = evaluate_pose(oracle(wall_set), wall_set, 32, pictures=2)
    scores = found.numbers["scores"]
    assert [scores[f"auc{t}"] for t in (5, 10, 20)] == pytest.approx([100] * 3, abs=1e-3)
    assert scores["rotation_median"] < 1e-3
    assert (found.numbers["pairs"], found.numbers["set_pairs"], len(found.pictures)) == (8, 8, 2)
    assert found.numbers["per_sequence"].keys() == {pair.name for pair in wall_set.pairs}
    assert all(np.asarray(picture).std() > 10 for picture in found.pictures)

    angle = np.radians(10)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    scores = evaluate_pose(oracle(wall_set, lambda R, t: (R @ turn, t)), wall_set, 32).numbers["scores"]
    # The recall is 0 up to the pairs at 10 degrees, so that the area from there to 20 is half.
    assert [scores[f"auc{t}"] for t in (5, 10, 20)] == pytest.approx([0, 0, 50], abs=7)
    assert scores["rotation_median"] == pytest.approx(10, abs=1e-6)
    for change in (lambda R, t: (R, 0 * t), lambda R, t: (R, -t), lambda R, t: (np.nan * R, t)):
        scores = evaluate_pose(oracle(wall_set, change), wall_set, 32).numbers["scores"]
        assert scores["auc20"] == 0
        assert scores["direction_median"] == pytest.approx(180, abs=1e-3)
    some = evaluate_pose(oracle(wall_set.first(3)), wall_set, 32, most=3)
    assert (some.numbers["pairs"], some.numbers["set_pairs"]) == (3, 8)
    assert some.numbers["scores"]["auc5"] == pytest.approx(100, abs=1e-3)


def test_a_list_of_pairs_needs_no_depth_but_poses(wall_file):
    records = [json.loads(line) for line in wall_file.read_text().splitlines()]
    for record in records[1:]:
        del record["depth_a"], record["depth_b"]
    wall_file.write_text("\n".join(map(json.dumps, records)))
    assert len(open_pairs(str(wall_file)).pairs) == 1
    pairs = open_pairs(str(wall_file), needs_depth=False)
    assert evaluate_pose(oracle(pairs), pairs, 32).numbers["scores"]["auc5"] == pytest.approx(100, abs=1e-3)
    motorcycle = open_pairs("motorcycle")  # whose frames have no files
    assert evaluate_pose(oracle(motorcycle), motorcycle, 32).numbers["scores"]["auc5"] == pytest.approx(100, abs=1e-3)
    first = pairs.pairs[0]
    unknown = replace(first, a=replace(first.a, camera_from_world=None))
    outside = replace(first, b=replace(first.b, K=first.b.K @ [[1, 0, 9], [0, 1, 0], [0, 0, 1]]))
    for pair, message in ((unknown, r"no pose"), (outside, re.escape(f"'{first.b.file}': the principal point"))):
        with pytest.raises(FastmumError, match=message):
            evaluate_pose(oracle(pairs), PairSet("set", [pair]), 32)


def test_frames_without_intrinsics_are_cropped_in_the_middle(wall_file):
    pairs = open_pairs(str(wall_file))
    pair = pairs.pairs[0]
    images = []
    for each in (pair, Pair("a", "wall", replace(pair.a, K=None), replace(pair.b, K=None))):
        evaluate_pose(lambda x: (images.append(x), (np.eye(3)[None], np.ones((1, 3))))[1], PairSet("s", [each]), 32)
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1


@pytest.mark.slow
def test_the_command_evaluates_a_run_and_names_what_is_wrong(wall_file, tmp_path, capsys, refusal, monkeypatch):
    run, out = train_tiny(tmp_path / "tiny", "train.eval_first=true", "train.picture_every=1"), tmp_path / "out"
    words = ["pose", "--weights", str(run), "--data", str(wall_file), "--out", str(out), "--pictures", "1"]
    assert main(words) == 0
    assert "AUC@20" in capsys.readouterr().out
    (file,) = out.glob("pose-*.json")
    content = json.loads(file.read_text())
    assert (content["step"], content["frames"], content["pairs"]) == (1, 8, 8)
    assert content["scores"].keys() == {"auc5", "auc10", "auc20", "rotation_median", "direction_median"}
    assert all(np.isfinite(value) for value in content["scores"].values())
    assert len([*out.glob("pose-*.jpg")]) == 1
    assert (run / "pose.png").is_file()
    assert "patch" in refusal(main, *words, "--size", 40)
    assert "reconstruction" in refusal(main, "reconstruction", *words[1:])
