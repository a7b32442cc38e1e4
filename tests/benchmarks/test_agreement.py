"""The benchmarks of training steps, at tiny sizes: both contestants take the same steps, or nothing is timed."""

from contextlib import closing
from functools import partial

import pytest

from benchmarks.pose import PoseComparison
from benchmarks.reconstruction import SceneComparison
from benchmarks.roma import RomaComparison
from benchmarks.step import Comparison, DisagreementError

FP32 = ["model.compile=off", "train.precision=fp32"]
MUM = ["model.preset=mum_tiny", "data.image_size=32", "model.compile=off"]
POSE = [
    "model.encoder=random:mum_tiny", "model.embed_dim=64", "model.num_heads=2", "model.depth=2", "model.head_dim=32",
    "data.image_size=48", *FP32,
]  # fmt: skip
SCENES = [
    "model.encoder=random:mum_tiny", "model.embed_dim=64", "model.num_heads=4", "model.pairs=2",
    "model.taps=[0,0,1,1]", "model.dpt_features=32", "model.dpt_levels=[32,32,32,32]", "model.camera_heads=4",
    "model.camera_blocks=1", "data.image_size=48", *FP32,
]  # fmt: skip
MATCHING = [
    "data.image_size=64", "model.vgg=[4,4,8,8]", "model.projected=[8,8,8,4,4]", "model.displacement=[4,4,4,2,2]",
    "model.radius=[2,1,1,0,0]", "model.gp_dim=8", "model.num_heads=2", "model.blocks=1", "model.anchors=4",
    "model.hidden_blocks=1", "train.device=cpu", *FP32,
]  # fmt: skip
COMPARISONS = {
    "pretraining": partial(Comparison, 4, 2, MUM, compiled=False),
    "pose": partial(PoseComparison, 2, POSE),
    "reconstruction": partial(SceneComparison, 4, 2, SCENES),
    "matching": partial(RomaComparison, 2, False, MATCHING),
    "refiners": partial(RomaComparison, 2, True, MATCHING),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARISONS)
def test_losses_agree_or_nothing_is_timed(name):
    with closing(COMPARISONS[name]()) as comparison:
        comparison.check()
        comparison.run(rounds=1)
        assert "reference / fastmum" in comparison.table()
        for contestant in comparison.contestants.values():
            (times,) = contestant.rounds
            step = times.pop("step")
            assert 0 < sum(times.values()) <= step
        # One step ahead is enough to be seen, but for matching's learning rate of 1e-6.
        for _ in range(30 if name in ("matching", "refiners") else 1):
            comparison.contestants["reference"]()
        with pytest.raises(DisagreementError, match="loss of step 1"):
            comparison.check()
