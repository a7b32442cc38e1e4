"""The engine trains another task as exactly as MuM: micro-batches, processes, kills, resume, EMA, clipping."""

import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
from tiny_task import RunningModel, TinyConfig, TinyTask

from fastmum.config import ConfigError, load_config
from fastmum.engine.checkpoint import CheckpointError, find_checkpoints, read_weights
from fastmum.engine.checkpoint.writer import Snapshot
from fastmum.engine.distributed import DistContext
from fastmum.engine.rundir import read_metrics
from fastmum.engine.stop import REQUEUE
from fastmum.train import train

TINY = [
    "run.task=tiny", "optim.base_lr=0.2", "optim.warmup_steps=2", "optim.clip=0.3", "train.steps=20",
    "train.log_every=1", "train.checkpoint_every=5", "train.keep_checkpoints=9", "train.eval_every=10",
    "train.picture_every=20", "train.threads=1", "train.precision=fp32", "train.ema=0.9",
]  # fmt: skip
STRATEGIES = {"ddp": (), "fsdp2": ("parallel.strategy=fsdp2",)}


@pytest.fixture
def run(crew, tmp_path):
    def run(name, size, *more):
        assert crew.train(size, [*TINY, f"run.dir={tmp_path / name}", *more]) == [0] * size
        return read_metrics(tmp_path / name / "metrics.jsonl")

    return run


def numbers(records):
    keys = "step", "loss", "mae", "mae/output_2", "grad_norm", "grad_norm/trunk", "lr", "held_out_loss_ema"
    return [[r.get(key) for key in keys] for r in records]


def assert_close(ours, theirs):
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for key in ("loss", "mae", "mae/output_2", "grad_norm", "grad_norm/trunk", "grad_norm/out", "held_out_loss_ema"):
        pairs = [(r[key], other[key]) for r, other in zip(ours, theirs, strict=True) if key in r]
        assert pairs
        torch.testing.assert_close(*map(torch.tensor, zip(*pairs, strict=True)), rtol=1e-5, atol=1e-6)


def test_a_step_is_that_of_plain_pytorch(tmp_path):
    """Loss over the weights of all micro-batches, clipping by group, scaled rates, EMA: by hand."""
    config = load_config(None, [*TINY, f"run.dir={tmp_path}/run", "train.steps=4", "optim.warmup_steps=0"], TinyConfig)
    assert train(config, TinyTask) == 0
    task = TinyTask(config, DistContext())
    task.batches_per_step = 4
    torch.manual_seed(config.run.seed)
    model = task.build()
    ema = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [model.trunk.weight], "weight_decay": 0.1, "scale": 0.5},
        {"params": [model.trunk.bias], "weight_decay": 0.0, "scale": 0.5},
        {"params": [*model.out.parameters()], "weight_decay": 0.0, "scale": 1.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=tuple(config.optim.betas), eps=config.optim.eps)
    clipped = []
    batches, records = task.batches(0, 4), read_metrics(tmp_path / "run/metrics.jsonl")
    for record in records:
        outputs = [task.loss(model, next(batches)) for _ in range(4)]
        loss = sum(o.loss_sum for o in outputs) / sum(o.weight for o in outputs)
        loss.backward()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        for part, clip in ((model.trunk, 0.05), (model.out, 0.3)):
            norm = torch.nn.utils.clip_grad_norm_(part.parameters(), clip)
            clipped.append(norm > clip)
        for group in adamw.param_groups:
            group["lr"] = record["lr"] * group["scale"]
        adamw.step()
        adamw.zero_grad()
        for name, average in ema.items():
            average.lerp_(model.get_parameter(name).detach(), 0.1)
    assert sum(clipped) > 3, "the test must clip"
    written = read_weights(tmp_path / "run").tensors
    assert written.keys() == ema.keys(), "frozen weights are not in a checkpoint"
    for name, value in written.items():
        torch.testing.assert_close(value, model.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)
    averaged = task.build()
    averaged.load_state_dict(model.state_dict() | ema)
    assert records[-1]["held_out_loss_ema"] == pytest.approx(task.evaluate(averaged)["held_out_loss"], rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulation_and_processes_give_the_same_steps(run, strategy):
    alone, together = run("alone", 1), run("together", 2, *STRATEGIES[strategy])
    assert_close(together, alone)
    assert together[-1]["loss"] < 0.9 * together[0]["loss"]


def test_a_run_moves_between_processes_and_strategies(run, tmp_path):
    whole = run("whole", 1)
    for size, strategy, steps in ((2, "fsdp2", 5), (1, "ddp", 10), (2, "ddp", 15), (1, "fsdp2", 20)):
        run("moved", size, *STRATEGIES[strategy], f"train.steps={steps}", "optim.schedule=wsd", "optim.decay_share=0")
    constant = run("constant", 1, "optim.schedule=wsd", "optim.decay_share=0")
    moved = read_metrics(tmp_path / "moved/metrics.jsonl")
    for ours, theirs in zip(moved, constant, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert moved[-1]["loss"] != pytest.approx(whole[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_bit_for_bit(start, tmp_path, precision):
    words = [*TINY, f"train.precision={precision}", "train.steps=90", "train.checkpoint_every=4"]
    (process,) = start(1, *words, f"run.dir={tmp_path}/whole")
    process.join()
    rng, run = random.Random(0), tmp_path / "run"
    for kill in range(3):
        (process,) = start(1, *words)
        deadline = time.monotonic() + 60
        while len(read_metrics(run / "metrics.jsonl")) < 20 * (kill + 1) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05 * rng.random())
        process.kill()
        process.join()
    (process,) = start(1, *words)
    process.join()
    assert process.exitcode == 0, (tmp_path / "words-0").read_text()
    assert numbers(read_metrics(run / "metrics.jsonl")) == numbers(read_metrics(tmp_path / "whole/metrics.jsonl"))


def test_a_signal_to_one_of_two_processes_saves_both(start, tmp_path):
    processes = start(2, *TINY, "train.steps=100000", "train.eval_every=100000", "train.picture_every=100000")
    deadline = time.monotonic() + 60
    while not read_metrics(tmp_path / "run/metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == REQUEUE
    newest = find_checkpoints(tmp_path / "run")[0]
    assert newest.path.name == f"step_{read_metrics(tmp_path / 'run/metrics.jsonl')[-1]['step']:07d}"


def test_buffers_are_saved_as_of_their_step_and_resumed(tmp_path, monkeypatch):
    """The copy is made while the forward passes of the next step change them."""
    means, copy, changed = [], Snapshot.copy, threading.Event()

    class RunningTask(TinyTask):
        def build(self):
            return RunningModel(16)

        def buffers(self, model):
            return {"mean": model.mean}

        def loss(self, model, batch):
            output = super().loss(model, batch)
            means.append(model.mean.clone())
            if len(means) > 2 * 4:
                changed.set()
            return output

    monkeypatch.setattr(Snapshot, "copy", lambda self: changed.wait(60) and copy(self))
    words = [*TINY, f"run.dir={tmp_path}/run", "train.steps=3", "train.checkpoint_every=2"]
    config = load_config(None, words, TinyConfig)
    assert train(config, RunningTask) == 0
    written = read_weights(tmp_path / "run/checkpoints/step_0000002").tensors["mean"]
    assert torch.equal(written, means[2 * 4 - 1])
    assert not torch.equal(written, means[2 * 4])
    whole = read_metrics(tmp_path / "run/metrics.jsonl")
    shutil.rmtree(tmp_path / "run/checkpoints/step_0000003")
    assert train(config, RunningTask) == 0
    assert numbers(read_metrics(tmp_path / "run/metrics.jsonl")) == numbers(whole)


def test_other_sizes_and_groups_are_refused(tmp_path):
    words = [*TINY, f"run.dir={tmp_path}/run", "train.steps=2"]
    assert train(load_config(None, words, TinyConfig), TinyTask) == 0
    with pytest.raises(CheckpointError, match="hidden"):
        train(load_config(None, [*words, "tiny.hidden=8", "train.steps=3"], TinyConfig), TinyTask)
    with pytest.raises(ConfigError, match="batch_per_step"):
        train(load_config(None, [*words, "tiny.batch_per_step=20", "train.steps=3"], TinyConfig), TinyTask)

    class Forgetful(TinyTask):
        def groups(self, model):
            return super().groups(model)[:1]

    with pytest.raises(ValueError, match="out"):
        train(load_config(None, [*words, "train.resume=never"], TinyConfig), Forgetful)
