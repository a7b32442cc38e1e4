"""The benchmark of reconstruction's step, at a tiny size, and its prediction."""

import pytest

from benchmarks.offline.reconstruction import PAPER_SECONDS, seconds, work
from benchmarks.reconstruction import SceneComparison, main
from benchmarks.step import DisagreementError
from fastmum.model.config import PRESETS
from fastmum.tasks.reconstruction.model import ReconstructionConfig

TINY = [
    "model.encoder=random:mum_tiny", "model.embed_dim=64", "model.num_heads=4", "model.pairs=2",
    "model.taps=[0,0,1,1]", "model.dpt_features=32", "model.dpt_levels=[32,32,32,32]", "model.camera_heads=4",
    "model.camera_blocks=1", "data.image_size=48", "model.compile=off", "train.precision=fp32",
]  # fmt: skip


@pytest.mark.slow
def test_losses_agree_or_nothing_is_timed():
    comparison = SceneComparison(4, 2, TINY)
    try:
        comparison.check()
        comparison.run(rounds=1)
        assert {*comparison.rounds("step")} == {"reference", "fastmum"}
        comparison.contestants["reference"]()  # one step ahead
        with pytest.raises(DisagreementError, match="loss of step 1"):
            comparison.check()
    finally:
        comparison.close()


def test_invalid_arguments(refusal):
    assert "--frames is 5" in refusal(main, "--frames=5", "--views=2")


@pytest.mark.slow
def test_the_prediction_counts_what_the_task_counts():
    config = ReconstructionConfig(pairs=4, taps=(0, 1, 2, 3), dpt_features=64, dpt_levels=(64, 64, 64, 64))
    kept, recomputed = (work(config, PRESETS["mum_vitb16"], again) for again in (False, True))
    assert recomputed.products > kept.products
    assert recomputed.convolutions == kept.convolutions
    low, likely, high = seconds(kept)
    assert 0 < low < likely < high
    assert pytest.approx(2.592) == PAPER_SECONDS
