"""Runs of reconstruction: micro-batches, processes, strategies and resuming give the same steps."""

import shutil

import pytest
from runs import check_a_nan_is_skipped

from fastmum.config import ConfigError
from fastmum.data.build import build
from fastmum.engine.checkpoint import CheckpointError, read_weights
from fastmum.engine.rundir import read_metrics
from fastmum.errors import FastmumError
from fastmum.scenes import ensure_scenes

ARGS = [
    "run.task=reconstruction", "model.encoder=random:mum_tiny", "model.embed_dim=32", "model.pairs=2",
    "model.num_heads=2", "model.registers=1", "model.taps=[0,0,1,1]", "model.dpt_features=16",
    "model.dpt_levels=[16,16,16,16]", "model.camera_heads=4", "model.camera_blocks=1", "data.image_size=64",
    "data.views=[2,4]", "data.min_frames=4", "data.frames_per_batch=4", "data.frames_per_step=8", "data.workers=1",
    "data.scenes.count=3", "data.scenes.views=6", "data.scenes.size=64", "optim.warmup_steps=2", "train.steps=4",
    "train.log_every=1", "train.checkpoint_every=2", "train.eval_every=2", "train.eval_batches=1", "train.threads=1",
    "train.precision=fp32",
]  # fmt: skip
GROUPS = "aggregator", "camera", "depth"
WITHOUT_POINTS = "model.points=false"  # the gradient of the normals' loss is ill-conditioned


def same_steps(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4), (a["step"], name)


@pytest.mark.slow
def test_steps_agree_on_any_number_of_processes_and_after_resuming(run, tmp_path):
    single = run("single", 1, WITHOUT_POINTS)
    assert single[-1].keys() >= {"loss", "held_out_loss", *(f"grad_norm/{group}" for group in GROUPS)}
    assert single[0]["lr"] == pytest.approx(1e-8 + (2e-4 - 1e-8) / 2)
    for name, args in (("ddp", ()), ("fsdp2", ("parallel.strategy=fsdp2",))):
        same_steps(run(name, 2, WITHOUT_POINTS, *args), single)
    weights = read_weights(tmp_path / "single").tensors
    assert not any(name.startswith("encoder.") for name in weights)
    shutil.rmtree(tmp_path / "single/checkpoints/step_0000004")
    same_steps(run("single", 1, WITHOUT_POINTS, "model.recompute=all", "model.chunk=3"), single)
    with pytest.raises(CheckpointError, match="frozen_encoder"):
        run("single", 1, WITHOUT_POINTS, "model.encoder=random:mum_vitb16", "train.steps=6")


@pytest.mark.slow
def test_heads_are_float32_and_the_encoder_learns_if_asked(run, tmp_path):
    args = "train.precision=bf16", "model.finetune=true", "model.encoder_lr_scale=0.5", "train.steps=2"
    single = run("single", 1, *args)
    assert single[-1].keys() >= {"grad_norm/encoder", "grad_norm/points"}
    sharded = run("sharded", 2, *args, "parallel.strategy=fsdp2")
    assert [r["loss"] for r in sharded] == pytest.approx([r["loss"] for r in single], rel=2e-2)
    learnt = read_weights(tmp_path / "single").tensors
    head = learnt["camera_head.embed_pose.weight"]
    assert (head.bfloat16().float() != head).any()
    assert any(name.startswith("encoder.") for name in learnt)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_processes_skip_a_step_that_is_not_finite_on_one(pool, tmp_path, strategy):
    check_a_nan_is_skipped(pool, tmp_path, [*ARGS, WITHOUT_POINTS], strategy)


@pytest.mark.slow
def test_bad_depth_files_are_counted_and_a_missing_encoder_is_replaced_if_asked(run, tmp_path):
    scenes = tmp_path / "scenes"
    shutil.copytree(ensure_scenes(count=3, views=24, size=64, progress=False), scenes)
    for scene in scenes.iterdir():  # one of 24 frames: more than 5 % would end the run
        file = scene / "depth/002.png"
        file.write_bytes(file.read_bytes()[:100])
    build("scenes", scenes, tmp_path / "scenes.arrow")
    args = f"data.manifests=[{tmp_path / 'scenes.arrow'}]", "data.retry_s=0", "train.steps=8", "train.eval_first=true"
    encoder = f"model.encoder={tmp_path / 'nothing'}"
    with pytest.raises(FastmumError, match="nothing"):
        run("refused", 1, encoder, *args)
    run("run", 1, encoder, "model.fallback=random:mum_tiny", *args)
    untrained, *records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert untrained["step"] == 0
    assert untrained.keys() >= {"auc30", "abs_rel", "abs_rel_of_mean_depth", "held_out_loss"}
    assert records[-1]["abs_rel_of_mean_depth"] == untrained["abs_rel_of_mean_depth"] > 0
    assert records[-1]["bad_frames"] > 0
    assert all(record["loss"] is not None and not record["skipped_steps"] for record in records)
    assert ".png" in (tmp_path / "run/bad_frames.log").read_text()


@pytest.mark.slow
def test_distillation_agrees_on_two_processes_that_share_a_cache(run, tmp_path):
    run("teacher", 1, WITHOUT_POINTS, "train.steps=2")
    args = (
        WITHOUT_POINTS, "run.task=distillation", "model.finetune=true", f"distill.teacher={tmp_path / 'teacher'}",
        "distill.repeat_after=2", "optim.base_lr=1e-3",
    )  # fmt: skip
    single = run("student", 1, *args)
    assert single[-1]["loss"] < single[0]["loss"]
    same_steps(run("ddp", 2, *args), single)
    sharded = run("cached", 2, *args, "parallel.strategy=fsdp2", f"distill.cache={tmp_path / 'cache'}")
    for a, b in zip(sharded, single, strict=True):  # the cache rounds
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    again = run("again", 1, *args, f"distill.cache={tmp_path / 'cache'}")
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in sharded], rel=1e-4)
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert files


def test_what_does_not_fit_is_refused(run):
    for change, name in (("model.taps=[0,1,2,2]", "taps"), ("data.image_size=40", "image_size"),
                         ("train.cuda_graphs=true", "cuda_graphs")):  # fmt: skip
        with pytest.raises(ConfigError, match=name):
            run("refused", 1, change)
