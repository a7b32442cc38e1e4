"""The engine trains another task as exactly as MuM: micro-batches, processes, kills, resume, EMA, clipping."""

import shutil
import threading

import pytest
import torch
from runs import numbers
from tiny_task import TINY, RunningModel, TinyConfig, TinyTask

from fastmum.config import ConfigError, load_config
from fastmum.engine.checkpoint import CheckpointError, read_weights
from fastmum.engine.checkpoint.writer import Snapshot
from fastmum.engine.distributed import DistContext
from fastmum.engine.step import TrainingError
from fastmum.train import train

ARGS = TINY
STRATEGIES = {"ddp": (), "fsdp2": ("parallel.strategy=fsdp2",)}
MUON = ("optim.optimizer=muon", "optim.base_lr=0.02")


def configure(tmp_path, *more):
    return load_config(None, [*TINY, f"run.dir={tmp_path}/run", *more], TinyConfig)


def test_a_step_is_that_of_plain_pytorch(tmp_path):
    config = configure(tmp_path, "train.steps=4", "optim.warmup_steps=0")
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
    clipped, batches, records = [], task.batches(0, 4), numbers(tmp_path / "run")
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
    learnt = {name: model.get_parameter(name).detach() for name in ema}  # frozen weights are not in a checkpoint
    torch.testing.assert_close(read_weights(tmp_path / "run").tensors, learnt, rtol=1e-5, atol=1e-6)
    averaged = task.build()
    averaged.load_state_dict(model.state_dict() | ema)
    assert records[-1]["held_out_loss_ema"] == pytest.approx(task.evaluate(averaged)["held_out_loss"], rel=1e-4)


def test_accumulation_and_processes_give_the_same_steps(run):
    single = run("single", 1)
    assert single[-1].keys() >= {"loss", "mae/output_2", "grad_norm", "grad_norm/trunk", "held_out_loss_ema"}
    assert single[-1]["loss"] < 0.9 * single[0]["loss"]
    for strategy, args in STRATEGIES.items():
        torch.testing.assert_close(run(strategy, 2, *args), single, rtol=1e-5, atol=1e-6)
    single = run("muon", 1, *MUON)  # one matrix: a process has none to orthogonalise
    for strategy, args in STRATEGIES.items():
        torch.testing.assert_close(run(f"muon {strategy}", 2, *MUON, *args), single, rtol=1e-5, atol=1e-6)
    # By default a step has one micro-batch per process.
    single, several = run("twelve", 1, "tiny.batch_per_step=12"), run("default", 2, "tiny.batch_per_step=null")
    torch.testing.assert_close(several, single, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="start 1, 3 processes"):
        run("indivisible", 2, "tiny.batch_per_step=18")


def test_a_run_moves_between_processes_and_strategies(run):
    constant = ("optim.schedule=wsd", "optim.decay_share=0")
    for size, strategy, steps in ((2, "fsdp2", 5), (1, "ddp", 10), (2, "ddp", 15), (1, "fsdp2", 20)):
        moved = run("moved", size, *STRATEGIES[strategy], f"train.steps={steps}", *constant)
    whole = run("whole", 1, *constant)
    assert [r["loss"] for r in moved] == pytest.approx([r["loss"] for r in whole], rel=1e-5)
    assert moved[-1]["loss"] != pytest.approx(run("cosine", 1)[-1]["loss"], rel=1e-5)


def test_buffers_are_saved_as_of_their_step_and_resumed(tmp_path, monkeypatch):
    """The copy is made while the forward passes of the next step change them."""
    means, copy, changed = [], Snapshot.copy, threading.Event()

    class RunningTask(TinyTask):
        def build(self):
            return RunningModel(16)

        def loss(self, model, batch):
            output = super().loss(model, batch)
            means.append(model.mean.clone())
            if len(means) > 2 * 4:
                changed.set()
            return output

    monkeypatch.setattr(Snapshot, "copy", lambda self: changed.wait(60) and copy(self))
    config = configure(tmp_path, "train.steps=3", "train.checkpoint_every=2")
    assert train(config, RunningTask) == 0
    written = read_weights(tmp_path / "run/checkpoints/step_0000002").tensors["mean"]
    assert torch.equal(written, means[2 * 4 - 1])
    assert not torch.equal(written, means[2 * 4])
    whole = numbers(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_0000003")
    assert train(config, RunningTask) == 0
    assert numbers(tmp_path / "run") == whole


def test_other_sizes_and_groups_are_refused(tmp_path):
    class MissingGroup(TinyTask):
        def groups(self, model):
            return super().groups(model)[:1]

    assert train(configure(tmp_path, "train.steps=2"), TinyTask) == 0
    for task, more, error, name in (
        (TinyTask, "tiny.hidden=8", CheckpointError, "hidden"),
        (TinyTask, "tiny.batch_per_step=20", ConfigError, "batch_per_step"),
        (TinyTask, "optim.optimizer=muon", CheckpointError, r"optim\.optimizer"),
        (TinyTask, "train.ema=null", CheckpointError, r"train\.ema"),
        (TinyTask, ("train.ema=null", "optim.optimizer=muon"), CheckpointError, r"train\.ema and optim\.optimizer"),
        (MissingGroup, "train.resume=never", ValueError, "out"),
    ):
        with pytest.raises(error, match=name):
            train(configure(tmp_path, "train.steps=3", *([more] if isinstance(more, str) else more)), task)
    muon = "optim.optimizer=muon", f"run.dir={tmp_path}/muon"
    assert train(configure(tmp_path, "train.steps=2", *muon), TinyTask) == 0
    with pytest.raises(CheckpointError, match=r"optim\.optimizer"):
        train(configure(tmp_path, "train.steps=3", muon[1]), TinyTask)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_matrix_without_a_gradient_is_refused_by_muon_only(tmp_path, parts):
    """In sums of several micro-batches, too."""

    class SometimesTask(TinyTask):
        def loss(self, model, batch):
            self.calls = getattr(self, "calls", 0) + 1
            model.trunk.requires_grad_(self.calls < 5)
            return super().loss(model, batch)

    args = f"tiny.batch_per_step={6 * parts}", "train.steps=8", "train.eval_every=100"
    assert train(configure(tmp_path, *args), SometimesTask) == 0
    with pytest.raises(TrainingError, match=r"trunk\.weight"):
        train(configure(tmp_path, *args, *MUON, f"run.dir={tmp_path}/muon"), SometimesTask)
