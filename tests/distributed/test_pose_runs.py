"""Runs of relative pose: micro-batches, processes, strategies and resuming give the same steps; bad files."""

import shutil

import pytest
from pose_runs import SMALL
from runs import check_a_nan_is_skipped

from fastmum.config import ConfigError
from fastmum.data.build import build
from fastmum.engine.checkpoint import read_weights
from fastmum.engine.rundir import read_metrics
from fastmum.errors import FastmumError
from fastmum.scenes import ensure_scenes

ARGS = [
    *SMALL, "data.pairs_per_step=8", "optim.warmup_steps=2", "train.steps=4", "train.log_every=1",
    "train.checkpoint_every=2", "train.eval_every=2",
]  # fmt: skip


def same_steps(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), (a["step"], name)


@pytest.mark.slow
def test_steps_agree_on_any_number_of_processes_and_after_resuming(run, tmp_path):
    single = run("single", 1)
    assert single[-1].keys() >= {"loss", "held_out_loss", "grad_norm/encoder", "grad_norm/head"}
    for name, args in (("ddp", ()), ("fsdp2", ("parallel.strategy=fsdp2",))):
        same_steps(run(name, 2, *args), single)
    shutil.rmtree(tmp_path / "single/checkpoints/step_0000004")
    same_steps(run("single", 1, "model.recompute=blocks"), single)
    weights = read_weights(tmp_path / "single").tensors
    assert any(name.startswith("encoder.") for name in weights)


@pytest.mark.slow
def test_both_processes_skip_a_step_that_is_not_finite_on_one(pool, tmp_path):
    check_a_nan_is_skipped(pool, tmp_path, ARGS, "ddp")


@pytest.mark.slow
def test_a_frozen_encoder_and_a_float32_head_in_bf16(run, tmp_path):
    args = "train.precision=bf16", "model.finetune=false", "train.steps=2"
    single = run("single", 1, *args)
    assert "grad_norm/encoder" not in single[-1]
    sharded = run("sharded", 2, *args, "parallel.strategy=fsdp2")
    assert [r["loss"] for r in sharded] == pytest.approx([r["loss"] for r in single], rel=2e-2)
    learnt = read_weights(tmp_path / "single").tensors
    head = learnt["head.fc1.weight"]
    assert (head.bfloat16().float() != head).any()
    assert not any(name.startswith("encoder.") for name in learnt)
    with pytest.raises(FastmumError, match="frozen_encoder"):
        run("single", 1, *args[:2], "model.encoder=random:mum_vitb16", "train.steps=6")


@pytest.mark.slow
def test_bad_images_are_counted_and_pairs_without_overlap_refused(run, tmp_path):
    scenes = tmp_path / "scenes"
    shutil.copytree(ensure_scenes(count=3, views=24, size=64, progress=False), scenes)
    for scene in scenes.iterdir():  # one of 24 frames: more than 5 % would end the run
        file = scene / "002.png"
        file.write_bytes(file.read_bytes()[:100])
    build("scenes", scenes, tmp_path / "scenes.arrow")
    args = f"data.manifests=[{tmp_path / 'scenes.arrow'}]", "data.retry_s=0", "train.steps=8", "train.eval_first=true"
    run("run", 1, *args, "data.sampling=distance")
    untrained, *records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert untrained["step"] == 0
    assert untrained.keys() >= {"auc20", "rotation_median", "rotation_median_of_mean_pose", "held_out_loss"}
    assert records[-1]["rotation_median_of_mean_pose"] == untrained["rotation_median_of_mean_pose"] > 0
    assert records[-1]["bad_frames"] > 0
    assert all(record["loss"] is not None and not record["skipped_steps"] for record in records)
    with pytest.raises(FastmumError, match=r"overlap in \[0\.999, 1"):
        run("refused", 1, *args, "data.overlap=[0.999,1.0]")


def test_what_does_not_fit_is_refused(run):
    for change, name in (("model.embed_dim=30", "embed_dim"), ("data.image_size=40", "image_size"),
                         ("data.overlap=[0.7,0.1]", "overlap"), ("data.gaps={scenes: [3, 1]}", "gaps"),
                         ("train.cuda_graphs=true", "cuda_graphs")):  # fmt: skip
        with pytest.raises(ConfigError, match=name):
            run("refused", 1, change)
