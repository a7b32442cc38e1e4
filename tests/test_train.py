"""Whole runs through the command line, on a folder of small images."""

import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastmum.data.build import build
from fastmum.data.loader import Loader
from fastmum.engine.checkpoint import find_checkpoints, read_weights
from fastmum.engine.rundir import read_metrics
from fastmum.engine.stop import REQUEUE
from fastmum.tasks.mum import MuMTask
from fastmum.train import main

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="DALI is not installed: pip install 'fastmum[dali]'",
)

SMALL = [
    "model.preset=mum_tiny", "model.embed_dim=32", "model.depth=1", "model.num_heads=2", "model.decoder_embed_dim=32",
    "model.decoder_depth=2", "model.decoder_num_heads=2", "data.image_size=32", "data.views=[2,3]",
    "data.frames_per_batch=6", "data.held_out=0.3", "optim.base_lr=0.01", "optim.warmup_steps=2",
    "train.steps=8", "train.log_every=1", "train.checkpoint_every=3", "train.eval_every=4", "train.eval_batches=1",
    "train.picture_every=4", "train.threads=1",
]  # fmt: skip


def words(image_folder, run_dir, *more):
    return [*SMALL, f"data.root={image_folder}", f"run.dir={run_dir}", *more]


def losses(run_dir):
    return [(r["step"], r["loss"], r.get("held_out_loss")) for r in read_metrics(run_dir / "metrics.jsonl")]


def test_files_and_metrics_of_a_run(image_folder, tmp_path):
    run = tmp_path / "run"
    assert main(words(image_folder, run)) == 0
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 9))
    assert {
        "loss", "lr", "grad_norm", "frames_per_s", "tokens_per_s", "tflops", "mfu", "data_wait", "memory_gb",
        "skipped_steps", "bad_frames", "gpu_hours", "gpu_hours_projected",
    } <= records[0].keys()  # fmt: skip
    by_views = [value for name, value in records[0].items() if name.startswith("loss/views_")]
    assert min(by_views) <= records[0]["loss"] <= max(by_views)
    assert [r["step"] for r in records if "held_out_loss" in r] == [4, 8]
    assert 0.5 < records[0]["loss"] < 2
    assert 0 <= records[0]["data_wait"] <= 1
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert {"config.yaml", "reconstruction.png", "pictures/step_0000004.png", "pictures/step_0000008.png"} <= names
    assert [found.manifest.step for found in find_checkpoints(run)] == [8, 6, 3]
    assert any("tfevents" in n for n in names)
    assert (run / "pictures/step_0000008.png").read_bytes() == (run / "reconstruction.png").read_bytes()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_losses_and_another_does_not(image_folder, tmp_path, precision):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(words(image_folder, tmp_path / name, f"run.seed={seed}", f"train.precision={precision}"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def start(arguments):
    # A run slow enough to be hit: the process waits for no one, so the signal comes at a random moment.
    command = [sys.executable, "-m", "fastmum.train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ, text=True)


def wait_for_step(process, run, step):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        records = read_metrics(run / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"the run did not reach step {step}: {process.stderr.read()}")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGTERM, REQUEUE),
        pytest.param(signal.SIGUSR1, REQUEUE, marks=pytest.mark.slow),
    ],
)
def test_stopped_from_outside_it_saves_and_goes_on(image_folder, tmp_path, number, code):
    long = ("train.steps=400", "train.checkpoint_every=1000", "train.eval_every=400", "train.log_every=3")
    process = start(words(image_folder, tmp_path / "run", *long))
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "saved at step" in errors
    saved = find_checkpoints(tmp_path / "run")[0].manifest.step
    steps = saved + 4
    assert main(words(image_folder, tmp_path / "run", *long, f"train.steps={steps}")) == 0
    assert [s for s, _, _ in losses(tmp_path / "run")] == [*range(3, steps, 3), steps]


@pytest.mark.parametrize("mode", ["paper", "balanced"])
@pytest.mark.parametrize("decoder", ["pillow", pytest.param("dali_cpu", marks=needs_dali)])
def test_manifests_in_every_mode(image_folder, tmp_path, mode, decoder):
    """Two data sets of sequences by weight, and single images."""
    build("folder", image_folder, tmp_path / "a.arrow", dataset="a")
    build("folder", image_folder, tmp_path / "b.arrow", dataset="b")
    build("folder", image_folder, tmp_path / "images.arrow", dataset="images", single=True)
    manifests = f"data.manifests=[{tmp_path}/a.arrow,{tmp_path}/b.arrow,{tmp_path}/images.arrow]"
    more = ("data.root=null", manifests, "data.weights={a: 2}", f"data.mode={mode}", f"data.decoder={decoder}")
    assert main(words(image_folder, tmp_path / "run", *more, "data.imagenet_share=0.5")) == 0
    assert [s for s, _, _ in losses(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.parametrize(
    "precision", ["train.precision=fp32", pytest.param("train.precision=bf16", marks=pytest.mark.slow)]
)
def test_a_resumed_run_sees_the_images_that_it_began_with(image_folder, tmp_path, precision):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(words(image_folder, whole, precision)) == 0
    assert main(words(image_folder, resumed, precision)) == 0
    for step in (6, 8):
        shutil.rmtree(resumed / f"checkpoints/step_{step:07d}")
    for scene in range(4, 9):
        shutil.copytree(image_folder / "scene0", image_folder / f"scene{scene}")
    assert main(words(image_folder, resumed, precision)) == 0
    assert losses(resumed) == losses(whole)
    assert main(words(image_folder, tmp_path / "new", precision)) == 0
    assert losses(tmp_path / "new") != losses(whole)


def test_a_finished_run_is_kept_or_set_aside(image_folder, tmp_path, caplog):
    main(words(image_folder, tmp_path / "run"))
    before = losses(tmp_path / "run")
    with caplog.at_level("INFO"):
        assert main(words(image_folder, tmp_path / "run")) == 0
    assert "nothing to do" in caplog.text
    assert losses(tmp_path / "run") == before
    assert main(words(image_folder, tmp_path / "run", "train.resume=never")) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "run.old-1") == before


def test_a_run_can_begin_from_a_checkpoint_of_another(image_folder, tmp_path):
    main(words(image_folder, tmp_path / "a"))
    checkpoint = tmp_path / "a/checkpoints/step_0000003"
    assert main(words(image_folder, tmp_path / "b", f"train.resume={checkpoint}")) == 0
    assert losses(tmp_path / "b") == losses(tmp_path / "a")[3:]


def test_an_older_branch_is_not_mixed_with_the_checkpoints_after_it(image_folder, tmp_path):
    run = tmp_path / "run"
    main(words(image_folder, run))
    early = shutil.copytree(run / "checkpoints/step_0000003", tmp_path / "early")
    assert main(words(image_folder, run, f"train.resume={early}", "train.steps=5", "train.keep_checkpoints=1")) == 0
    assert [found.path.name for found in find_checkpoints(run)] == ["step_0000005"]
    assert (run / "checkpoints/step_0000008.abandoned").exists()


def test_too_many_bad_steps_stop_the_run_and_their_checkpoints_are_set_aside(image_folder, tmp_path, capsys):
    build("folder", image_folder, tmp_path / "a.arrow", dataset="a")
    more = ("data.root=null", f"data.manifests=[{tmp_path}/a.arrow]", "optim.base_lr=1e30", "optim.warmup_steps=0",
            "train.max_bad_steps=3", "train.checkpoint_every=1", "train.keep_checkpoints=9", "train.log_every=8",
            "train.eval_every=8")  # fmt: skip
    assert main(words(image_folder, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert "not finite in 7 consecutive steps (2 to 8; train.max_bad_steps is 3)" in error
    assert "from a 100%" in error
    assert f"checkpoint is {tmp_path}/run/checkpoints/step_0000001:" in error
    assert "a lower optim.base_lr" in error
    assert [found.manifest.step for found in find_checkpoints(tmp_path / "run")] == [1]


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("more", [(), ("data.frames_per_step=12",)], ids=["one batch", "two batches"])
def test_a_bad_step_is_skipped_and_counted(image_folder, tmp_path, monkeypatch, where, more):
    """The weights after it are those of a run that had made no such update; the mean loss leaves it out."""
    bad, poison = 5, {"loss": lambda loss: loss * math.nan, "gradient": Poison.apply}[where]
    calls, loss = [], MuMTask.loss

    def poisoned(self, model, batch):
        calls.append(0)
        output = loss(self, model, batch)
        micro_batches = 1 + len(more)
        return output._replace(loss_sum=poison(output.loss_sum)) if len(calls) == bad * micro_batches else output

    monkeypatch.setattr(MuMTask, "loss", poisoned)
    short = (*more, "train.steps=6", "train.checkpoint_every=1", "train.keep_checkpoints=9", "train.eval_every=6")
    assert main(words(image_folder, tmp_path / "run", *short)) == 0
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["skipped_steps"] for r in records] == [0, 0, 0, 0, 1, 1]
    assert [r["loss"] is None for r in records] == [False] * 4 + [True, False]
    before, after, next_one = (
        read_weights(tmp_path / f"run/checkpoints/step_000000{step}").tensors for step in (4, 5, 6)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], next_one[name]) for name in after)


class Poison(torch.autograd.Function):
    """The loss as it is, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def test_ema_clipping_and_plain_pixels(image_folder, tmp_path):
    """Both losses are logged, a resumed run continues both, and clipped steps have smaller updates."""
    more = ("train.ema=0.5", "optim.clip=0.01", "loss.norm_pix=false", "train.precision=fp32")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(words(image_folder, whole, *more)) == 0
    assert main(words(image_folder, resumed, *more, "train.steps=6", "train.eval_every=4")) == 0
    shutil.rmtree(resumed / "checkpoints/step_0000006")
    assert main(words(image_folder, resumed, *more)) == 0
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (resumed, whole))
    for key in ("loss", "held_out_loss", "held_out_loss_ema", "grad_norm"):
        assert [r.get(key) for r in ours] == [r.get(key) for r in theirs], key
    assert theirs[-1]["held_out_loss_ema"] != theirs[-1]["held_out_loss"]
    plain = tmp_path / "plain"
    assert main(words(image_folder, plain, "train.precision=fp32")) == 0
    first = read_metrics(plain / "metrics.jsonl")
    assert first[0]["loss"] != theirs[0]["loss"], "targets are other pixels"
    assert main(words(image_folder, tmp_path / "clipped", "train.precision=fp32", "optim.clip=0.01")) == 0
    clipped = read_metrics(tmp_path / "clipped/metrics.jsonl")
    assert clipped[0]["grad_norm"] == first[0]["grad_norm"] > 0.01, "the norm before clipping is logged"
    assert clipped[-1]["loss"] != first[-1]["loss"]


def test_without_held_out_scenes_there_is_still_a_picture(image_folder, tmp_path):
    assert main(words(image_folder, tmp_path / "run", "data.held_out=0")) == 0
    assert (tmp_path / "run/reconstruction.png").exists()
    assert all(held_out is None for _, _, held_out in losses(tmp_path / "run"))


def test_broken_images_are_counted_also_over_a_resume(image_folder, tmp_path):
    broken = image_folder / "scene0/2.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"broken")
    assert main(words(image_folder, tmp_path / "run")) == 0
    last = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert (last["bad_frames"], last["bad_frames/folder"]) == (1, 1)
    assert (tmp_path / "run/bad_frames.log").read_text().startswith(f"folder\t{broken}\t")
    broken.write_bytes(whole)
    assert main(words(image_folder, tmp_path / "run", "train.steps=10")) == 0
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["bad_frames/folder"] == 1


def test_replacements_keep_to_the_split_of_the_run(image_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("fastmum.tasks.mum.Loader", lambda *args: seen.append(Loader(*args)) or seen[-1])
    assert main(words(image_folder, tmp_path / "run")) == 0
    (loader,) = seen
    assert loader.faults.held_out.sum() == 1


def test_a_data_set_of_broken_images_stops_the_run(image_folder, tmp_path, capsys):
    for scene in image_folder.iterdir():
        (scene / "2.png").write_bytes(b"broken")
    assert main(words(image_folder, tmp_path / "run")) == 2
    assert "frames of the data set 'folder' cannot be decoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.root=/nowhere"], "data.root is '/nowhere'"),
        (["data.image_root=/nowhere"], "data.image_root is '/nowhere'"),
        (["data.root=null", "data.manifests=[/nowhere.arrow]"], "there is no manifest '/nowhere.arrow'"),
        (["data.weights={fodler: 2}"], "'fodler'"),
        (["data.mode=full"], "data.mode is 'full', but must be one of packed, balanced, paper"),
        (["data.decoder=gpu"], "data.decoder is 'gpu', but must be one of auto, dali, dali_cpu, pillow"),
        (["data.views=[7,8]", "data.frames_per_batch=8"], "data.root: no folder under"),
        (["train.stpes=3"], "nearest valid key is 'train.steps'"),
        (["--config", "nowhere.yaml"], "configuration file 'nowhere.yaml' does not exist"),
        (["train.device=tpu9"], "train.device is 'tpu9'"),
        (["train.device=meta"], "train.device is 'meta'"),
        (["run.dir=/proc/nowhere"], "run.dir is '/proc/nowhere'"),
        (["train.resume=/nowhere"], "'/nowhere' does not exist"),
        (["train.resume=latest"], "does not exist"),
        (["optim.base_lr=1e30", "optim.warmup_steps=0", "train.max_bad_steps=2"], "a lower optim.base_lr"),
        (["train.precision=fp8"], "train.precision is fp8, but cpu devices have no float8 products"),
        (["train.cuda_graphs=true"], "train.cuda_graphs is true, but CUDA graphs record what is compiled for CUDA"),
        (["optim.optimizer=apex"], "optim.optimizer is apex, but NVIDIA's Apex is not installed"),
    ],
)
def test_what_cannot_work_is_one_line(image_folder, tmp_path, capsys, more, message):
    assert main([*words(image_folder, tmp_path / "run"), *more]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert message in error[0]


def test_another_model_in_the_run_folder_is_refused(image_folder, tmp_path, capsys):
    main(words(image_folder, tmp_path / "run"))
    assert main(words(image_folder, tmp_path / "run", "model.depth=2")) == 2
    assert "depth 1 (configured: 2)" in capsys.readouterr().err


def test_help_lists_the_keys(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(key in out for key in ("run.dir", "train.steps", "data.root", "--print-config"))


def test_print_config_trains_nothing(image_folder, tmp_path, capsys):
    assert main([*words(image_folder, tmp_path / "run"), "--print-config"]) == 0
    assert f"dir: {tmp_path}/run" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
