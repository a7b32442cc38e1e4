"""Whole runs through the command line, on a folder of small images."""

import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from processes import wait_for
from runs import SMALL, numbers

from fastmum.config import load_config
from fastmum.data.build import build
from fastmum.data.loader import Loader
from fastmum.engine.checkpoint import find_checkpoints, read_weights
from fastmum.engine.rundir import read_metrics
from fastmum.engine.stop import REQUEUE
from fastmum.tasks.mum import MuMTask
from fastmum.train import main


@pytest.fixture
def run(image_folder, tmp_path):
    """Train in a folder with more arguments; returns the exit code."""

    def run(name, *more):
        return main([*SMALL, f"data.root={image_folder}", f"run.dir={tmp_path / name}", *more])

    return run


def test_files_and_metrics_of_a_run(run, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert run("run") == 0
    folder = tmp_path / "run"
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 9))
    assert {
        "loss", "lr", "grad_norm", "frames_per_s", "tokens_per_s", "tflops", "mfu", "data_wait", "memory_gb",
        "skipped_steps", "bad_frames", "gpu_hours", "gpu_hours_projected",
    } <= records[0].keys()  # fmt: skip
    by_views = [value for name, value in records[0].items() if name.startswith("loss/views_")]
    assert min(by_views) <= records[0]["loss"] <= max(by_views)
    assert [r["step"] for r in records if "held_out_loss" in r] == [4, 8]
    assert 0.5 < records[0]["loss"] < 2
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == [f"step {step}/8" for step in range(1, 9)]
    assert [line.partition(":")[0] for line in lines if "held-out 0." in line] == ["step 4/8", "step 8/8"]
    pattern = r"step \d/8: loss [\d.]+, (held-out [\d.]+, )?lr [\d.e-]+, frames/s [\d.]+, left 0:\d\d:\d\d"
    assert all(re.fullmatch(pattern, line) for line in lines[1:]), lines  # the first step has no pace
    assert 0 <= records[0]["data_wait"] <= 1
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"config.yaml", "reconstruction.png", "pictures/step_0000004.png", "pictures/step_0000008.png"} <= names
    assert [found.manifest.step for found in find_checkpoints(folder)] == [8, 6, 3]
    assert any("tfevents" in n for n in names)
    assert (folder / "pictures/step_0000008.png").read_bytes() == (folder / "reconstruction.png").read_bytes()


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, REQUEUE)]
)
def test_a_signal_saves_and_the_run_resumes(run, image_folder, tmp_path, number, code):
    long = ("train.steps=400", "train.checkpoint_every=1000", "train.eval_every=400", "train.log_every=3")
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "fastmum.train", *SMALL, f"data.root={image_folder}", f"run.dir={folder}", *long]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: numbers(folder) or process.poll() is not None, "step 3")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert b"saved at step" in errors
    assert b"\r" not in errors
    steps = find_checkpoints(folder)[0].manifest.step + 4
    assert run("run", *long, f"train.steps={steps}") == 0
    assert [r["step"] for r in numbers(folder)] == [*range(3, steps, 3), steps]


@pytest.mark.parametrize(("mode", "decoder"), [("paper", "pillow"), ("balanced", "dali_cpu")])
def test_manifests(run, image_folder, tmp_path, mode, decoder):
    """Two data sets of sequences by weight, and single images."""
    if decoder == "dali_cpu":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'fastmum[dali]'")
    for name in ("a", "b", "images"):  # of copies, because no image may be trained on and held out
        folder = shutil.copytree(image_folder, tmp_path / f"of_{name}")
        build("folder", folder, tmp_path / f"{name}.arrow", dataset=name, single=name == "images")
    manifests = f"data.manifests=[{tmp_path}/a.arrow,{tmp_path}/b.arrow,{tmp_path}/images.arrow]"
    more = ("data.root=null", manifests, "data.weights={a: 2}", f"data.mode={mode}", f"data.decoder={decoder}")
    assert run("run", *more, "data.imagenet_share=0.5") == 0
    assert len(numbers(tmp_path / "run")) == 8


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_resumed_run_keeps_its_seed_and_its_images(run, image_folder, tmp_path, precision):
    precision = f"train.precision={precision}"
    for name in ("whole", "resumed"):
        assert run(name, precision) == 0
    assert numbers(tmp_path / "resumed") == numbers(tmp_path / "whole")
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"resumed/checkpoints/step_{step:07d}")
    assert run("seed", precision, "run.seed=2") == 0
    for scene in range(4, 9):
        shutil.copytree(image_folder / "scene0", image_folder / f"scene{scene}")
    assert run("resumed", precision) == 0
    assert numbers(tmp_path / "resumed") == numbers(tmp_path / "whole")
    assert run("images", precision) == 0
    assert numbers(tmp_path / "seed") != numbers(tmp_path / "whole") != numbers(tmp_path / "images")


def test_what_becomes_of_a_finished_run(run, tmp_path, caplog, capsys, monkeypatch):
    folder, checkpoint = tmp_path / "run", tmp_path / "run/checkpoints/step_0000003"
    run("run")
    before = numbers(folder)
    with caplog.at_level("INFO"):
        assert run("run") == 0
    assert "nothing to do" in caplog.text
    assert numbers(folder) == before
    assert run("run", "model.depth=2") == 2
    assert "depth 1 (configured: 2)" in capsys.readouterr().err
    assert run("other", f"train.resume={checkpoint}") == 0
    assert numbers(tmp_path / "other") == before[3:]
    assert load_config(tmp_path / "other/config.yaml").train.resume == "auto"  # which continues that run
    early = shutil.copytree(checkpoint, tmp_path / "early")
    assert run("run", "train.resume=never") == 0
    assert numbers(folder) == numbers(tmp_path / "run.old-1") == before
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the same command again, by SLURM or torchrun
    for name, how in (("run", "never"), ("other", early)):
        assert run(name, f"train.resume={how}", "train.steps=9") == 0
    assert numbers(folder)[:8] == before[:8]
    assert [record["step"] for record in numbers(tmp_path / "other")] == [4, 5, 6, 7, 8, 9]
    assert not (tmp_path / "run.old-2").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")  # which has not set the run aside yet
    assert run("other", "train.resume=never", "train.steps=3") == 0
    assert (tmp_path / "other.old-1").exists()
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    # An earlier branch is not mixed with the checkpoints after it.
    assert run("run", f"train.resume={early}", "train.steps=5", "train.keep_checkpoints=1") == 0
    assert [found.path.name for found in find_checkpoints(folder)] == ["step_0000005"]
    assert (folder / "checkpoints/step_0000008.abandoned").exists()


def test_a_run_with_other_settings_says_which_from_any_folder(run, tmp_path, monkeypatch, caplog):
    """Paths are absolute in the run's folder, also those of the file; the older configuration is kept."""
    monkeypatch.chdir(tmp_path)
    assert run("run", "data.root=images", "run.dir=run", "train.steps=2", "train.eval_every=99", "optim.min_lr=0") == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    caplog.clear()
    config = ["--config", str(tmp_path / "run/config.yaml")]
    assert main([*config, "train.steps=3"]) == main([*config, "train.steps=4", "base_lr=0.02", "schedule=wsd"]) == 0
    said = [line for line in caplog.messages if line.startswith("differs")]
    assert said[0] == "differs from the run so far: train.steps 2 -> 3"
    assert all(word in said[1] for word in ("base_lr 0.01 -> 0.02", "schedule cosine -> wsd", "train.steps 3 -> 4"))
    assert "min_lr" not in said[1]
    held = {file.name: load_config(file).optim.base_lr for file in (tmp_path / "run/configs").iterdir()}
    assert held == {"step_0000000.yaml": 0.01, "step_0000002.yaml": 0.01, "step_0000003.yaml": 0.02}
    assert [r["step"] for r in numbers(tmp_path / "run")] == [1, 2, 3, 4]
    assert list((tmp_path / "other").iterdir()) == []
    caplog.clear()
    assert run("next", f"train.resume={tmp_path}/run", "train.steps=5", "schedule=wsd", "train.eval_every=99") == 0
    assert "optim.base_lr 0.02 -> 0.01" in caplog.text


def test_intervals_longer_than_the_run_lose_nothing_and_a_warm_up_is_said(run, tmp_path, caplog):
    every = [f"train.{name}_every=99" for name in ("log", "eval", "checkpoint", "picture")]
    more = ("train.steps=2", "warmup_steps=2", "schedule=step", "milestones=[1,5]", "profile.steps=3")
    assert run("run", *every, *more) == 0
    assert all(f"{key} " in caplog.text for key in ("optim.warmup_steps", "optim.milestones", "profile.steps"))
    (record,) = numbers(tmp_path / "run")
    assert {"loss", "held_out_loss"} <= record.keys()
    assert [found.manifest.step for found in find_checkpoints(tmp_path / "run")] == [2]
    assert (tmp_path / "run/reconstruction.png").exists()
    caplog.clear()
    assert run("other", *every, "train.steps=3", "warmup_steps=2") == 0
    assert not [line for line in caplog.messages if "train.steps is" in line]


def test_too_many_bad_steps_stop_the_run_and_their_checkpoints_are_set_aside(run, image_folder, tmp_path, capsys):
    build("folder", image_folder, tmp_path / "a.arrow", dataset="a")
    more = ("data.root=null", f"data.manifests=[{tmp_path}/a.arrow]", "optim.base_lr=1e30", "optim.warmup_steps=0",
            "train.max_bad_steps=3", "train.checkpoint_every=1", "train.keep_checkpoints=9", "train.log_every=8",
            "train.eval_every=8")  # fmt: skip
    assert run("run", *more) == 2
    error = capsys.readouterr().err
    assert "7 consecutive steps (2 to 8; train.max_bad_steps is 3)" in error
    assert "from a 100%" in error
    assert f"{tmp_path}/run/checkpoints/step_0000001:" in error
    assert "optim.base_lr" in error
    assert [found.manifest.step for found in find_checkpoints(tmp_path / "run")] == [1]


@pytest.mark.parametrize(
    ("poison", "more"),
    [
        (lambda loss: loss * math.nan, ()),
        # The square root of zero has an infinite gradient.
        (lambda loss: loss + (loss - loss.detach()).sqrt(), ("data.frames_per_step=12",)),
    ],
    ids=["loss", "gradient in the second micro-batch"],
)
def test_a_bad_step_is_skipped_and_counted(run, tmp_path, monkeypatch, poison, more):
    """The step leaves the weights as they were; the mean loss leaves it out."""
    bad, calls, loss = 5 * (1 + len(more)), [], MuMTask.loss

    def poisoned(self, model, batch):
        calls.append(0)
        output = loss(self, model, batch)
        return output._replace(loss_sum=poison(output.loss_sum)) if len(calls) == bad else output

    monkeypatch.setattr(MuMTask, "loss", poisoned)
    short = (*more, "train.steps=6", "train.checkpoint_every=1", "train.keep_checkpoints=9", "train.eval_every=6")
    assert run("run", *short) == 0
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["skipped_steps"] for r in records] == [0, 0, 0, 0, 1, 1]
    assert [r["loss"] is None for r in records] == [False] * 4 + [True, False]
    before, after, next_one = (
        read_weights(tmp_path / f"run/checkpoints/step_000000{step}").tensors for step in (4, 5, 6)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], next_one[name]) for name in after)


def test_ema_clipping_and_plain_pixels(run, tmp_path):
    """Both losses are logged, a resumed run continues both, and clipped steps have smaller updates."""
    fp32, clip = "train.precision=fp32", "optim.clip=0.01"
    more = (fp32, clip, "train.ema=0.5", "loss.norm_pix=false")
    assert run("whole", *more) == 0
    assert run("resumed", *more, "train.steps=6", "train.eval_every=4") == 0
    shutil.rmtree(tmp_path / "resumed/checkpoints/step_0000006")
    assert run("resumed", *more) == 0
    whole = numbers(tmp_path / "whole")
    assert numbers(tmp_path / "resumed") == whole
    assert whole[-1]["held_out_loss_ema"] != whole[-1]["held_out_loss"]
    assert run("plain", fp32) == 0
    plain = numbers(tmp_path / "plain")
    assert plain[0]["loss"] != whole[0]["loss"], "targets are other pixels"
    assert run("clipped", fp32, clip) == 0
    clipped = numbers(tmp_path / "clipped")
    assert clipped[0]["grad_norm"] == plain[0]["grad_norm"] > 0.01, "the norm before clipping is logged"
    assert clipped[-1]["loss"] != plain[-1]["loss"]


def test_a_batch_of_one_frame(run, tmp_path):
    """Slices of gradients then have other strides in dimensions of one element, which mean nothing."""
    assert run("run", "data.views=[1,1]", "data.frames_per_batch=1", "train.steps=2") == 0
    assert [r["loss/views_1"] > 0 for r in numbers(tmp_path / "run")] == [True, True]


def test_without_held_out_scenes_there_is_still_a_picture(run, tmp_path):
    assert run("run", "data.held_out=0") == 0
    assert (tmp_path / "run/reconstruction.png").exists()
    assert not any("held_out_loss" in r for r in numbers(tmp_path / "run"))


def test_broken_images_are_counted_and_replaced_within_the_split(run, image_folder, tmp_path, monkeypatch):
    """The count continues when the run resumes."""
    seen = []
    monkeypatch.setattr("fastmum.tasks.mum.Loader", lambda *args: seen.append(Loader(*args)) or seen[-1])
    broken, folder = image_folder / "scene0/2.png", tmp_path / "run"
    whole = broken.read_bytes()
    broken.write_bytes(b"broken")
    assert run("run") == 0
    assert seen[0].faults.held_out.sum() == 1
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert (last["bad_frames"], last["bad_frames/folder"]) == (1, 1)
    assert (folder / "bad_frames.log").read_text().startswith(f"folder\t{broken}\t")
    broken.write_bytes(whole)
    assert run("run", "train.steps=10") == 0
    assert read_metrics(folder / "metrics.jsonl")[-1]["bad_frames/folder"] == 1


def test_a_stop_signal_is_followed_during_a_read_that_never_returns(run, tmp_path, monkeypatch):
    end, reads = threading.Event(), itertools.count()

    def regular(file):
        if (number := next(reads)) == 60:
            time.sleep(2)  # the loop has used all batches that were read ahead
            os.kill(os.getpid(), signal.SIGTERM)
        return file if number < 60 or end.wait(60) else None

    monkeypatch.setattr("fastmum.data.decode.image.regular", regular)
    monkeypatch.setattr("fastmum.data.loader.GRACE_S", 0.2)
    long = ("train.steps=100", "train.checkpoint_every=100", "data.cache_gb=0")
    assert run("run", *long) == REQUEUE
    end.set()
    (found,) = find_checkpoints(tmp_path / "run")
    assert found.manifest.step == numbers(tmp_path / "run")[-1]["step"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.root=/nowhere"], "data.root is '/nowhere'"),
        (["data.image_root=/nowhere"], "data.image_root is '/nowhere'"),
        (["data.root=null", "data.manifests=[/nowhere.arrow]"], "'/nowhere.arrow'"),
        (["data.weights={fodler: 2}"], "'fodler'"),
        (["data.views=[7,8]", "data.frames_per_batch=8"], "data.root"),
        (["train.stpes=3"], "'train.steps'"),
        (["train.device=tpu9"], "train.device is 'tpu9'"),
        (["train.device=meta"], "train.device is 'meta'"),
        (["run.dir=/proc/nowhere"], "run.dir is '/proc/nowhere'"),
        (["train.resume=/nowhere"], "'/nowhere' does not exist"),
        (["train.resume=latest"], "does not exist"),
        (["train.precision=fp8"], "train.precision is fp8"),
        (["train.cuda_graphs=true"], "train.cuda_graphs is true"),
        (["optim.optimizer=apex"], "optim.optimizer is apex"),
    ],
)
def test_an_error_is_one_line_and_names_the_key(run, capsys, more, message):
    assert run("run", *more) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert message in error[0]


def test_help_lists_the_keys_and_print_config_trains_nothing(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(key in out for key in ("run.dir", "train.steps", "data.root", "--print-config"))
    assert run("run", "--print-config") == 0
    assert f"dir: {tmp_path}/run" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
