"""Runs of matching: micro-batches, processes, strategies and resuming give the same steps; bad files."""

import shutil

import pytest
from roma_runs import TINY
from runs import check_a_nan_is_skipped

from fastmum.config import ConfigError
from fastmum.data.build import build
from fastmum.data.manifest import Manifests
from fastmum.data.overlap import pair_table
from fastmum.engine.checkpoint import CheckpointError, read_weights
from fastmum.engine.rundir import read_metrics
from fastmum.pretrained.layout import WeightsError
from fastmum.scenes import ensure_scenes

ARGS = [
    *TINY, "data.pairs_per_step=4", "train.steps=4", "train.checkpoint_every=2", "train.eval_every=2",
    "optim.milestones=[3]",
]  # fmt: skip
HELD_OUT = "held_out_loss"  # depends on running statistics


def same_steps(found, expected, ignored=""):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name != ignored:
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), (a["step"], name)


@pytest.mark.slow
def test_steps_agree_on_any_number_of_processes_and_after_resuming(run, tmp_path):
    single = run("single", 1)
    assert single[-1].keys() >= {"loss", "held_out_loss", "grad_norm/fine", "grad_norm/decoder"}
    assert [r["lr"] for r in single] == pytest.approx([5e-5] * 3 + [5e-6])
    whole = {"single": (1, single)}
    for name, args in (("ddp", ()), ("fsdp2", ("parallel.strategy=fsdp2",))):
        whole[name] = 2, run(name, 2, *args)
        # Two processes average the statistics of their micro-batches, one process sees them one after the other.
        same_steps(whole[name][1], single, HELD_OUT)
    weights = read_weights(tmp_path / "single").tensors
    assert not any(name.startswith("encoder.") for name in weights)
    assert any(name.endswith("running_var") for name in weights)
    for name in ("single", "ddp"):
        processes, expected = whole[name]
        shutil.rmtree(tmp_path / name / "checkpoints/step_0000004")
        same_steps(run(name, processes), expected)
    with pytest.raises(CheckpointError, match="frozen_encoder"):
        run("single", 1, "model.encoder=random:mum_vitb16", "train.steps=6")


@pytest.mark.slow
def test_both_processes_skip_a_step_that_is_not_finite_on_one(pool, tmp_path):
    """Running statistics of batch norm stay, too."""
    check_a_nan_is_skipped(pool, tmp_path, ARGS, "fsdp2")


@pytest.mark.slow
def test_bad_files_are_replaced_and_counted(run, tmp_path):
    scenes = tmp_path / "scenes"
    shutil.copytree(ensure_scenes(count=3, views=24, size=64, progress=False), scenes)
    build("scenes", scenes, tmp_path / "scenes.arrow")
    pair_table(Manifests([tmp_path / "scenes.arrow"]))  # files that are bad by then are in no pair
    for scene in scenes.iterdir():  # one of 24 frames: more than 5 % would end the run
        (scene / "005.png").write_bytes((scene / "005.png").read_bytes()[:100])
    args = f"data.manifests=[{tmp_path / 'scenes.arrow'}]", "data.retry_s=0", "train.steps=8"
    run("run", 1, *args)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert records[-1]["bad_frames"] > 0
    assert all(record["loss"] is not None and not record["skipped_steps"] for record in records)
    assert ".png" in (tmp_path / "run/bad_frames.log").read_text()


def test_what_does_not_fit_is_refused(run, tmp_path):
    for change, name in (("model.radius=[2,1]", "radius"), ("data.image_size=40", "image_size"),
                         ("model.num_heads=5", "num_heads"), ("data.shift=64", "shift"),
                         ("train.cuda_graphs=true", "cuda_graphs")):  # fmt: skip
        with pytest.raises(ConfigError, match=name):
            run("refused", 1, change)
    wrong = tmp_path / "vgg.pth"
    wrong.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"vgg\.pth"):
        run("refused", 1, f"model.fine={wrong}")
