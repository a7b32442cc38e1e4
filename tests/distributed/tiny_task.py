"""A second task: a frozen encoder, a head in two groups, micro-batches of unequal weight."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import nn

from fastmum.config.schema import EngineConfig, key
from fastmum.engine.device import to_device
from fastmum.engine.task import Metric, ParamGroup, Samples, StepOutput, Task
from fastmum.errors import FastmumError
from fastmum.progress import progress_bar

TINY = [
    "run.task=tiny", "optim.base_lr=0.2", "optim.warmup_steps=2", "optim.clip=0.3", "train.steps=20",
    "train.log_every=1", "train.checkpoint_every=5", "train.keep_checkpoints=9", "train.eval_every=10",
    "train.threads=1", "train.precision=fp32", "train.ema=0.9",
]  # fmt: skip


@dataclass
class TinySection:
    hidden: int = key(16, "width of the head", least=1)
    batch: int = key(6, "samples of a micro-batch", least=1)
    batch_per_step: int | None = key(24, "samples of a step")
    slow: list[float] = key([], "seconds in which each process opens its data")
    fails_at: int = key(0, "step whose data the last process cannot read; 0: none")


@dataclass
class TinyConfig(EngineConfig):
    tiny: TinySection = field(default_factory=TinySection)


class TinyModel(nn.Module):
    """Regression of four values on the features of a frozen encoder."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12)).requires_grad_(False).eval()
        self.trunk = nn.Linear(12, hidden)
        self.out = nn.Linear(hidden, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.trunk(self.encoder(x))))


class RunningModel(TinyModel):
    """Subtracts a running mean, which the forward pass updates as batch norm does."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(x.mean(0), 0.1)
        return super().forward(x - self.mean)


class TinyTask(Task):
    Config = TinyConfig
    metrics = {"mae": Metric(4, "output")}  # noqa: RUF012

    def __init__(self, config, world) -> None:
        super().__init__(config, world)
        tiny = config.tiny
        self.samples = Samples(tiny.batch, tiny.batch_per_step, "samples", ("tiny.batch", "tiny.batch_per_step"))

    def build(self):
        return TinyModel(self.config.tiny.hidden).to(self.world.device)

    def blocks(self, model):
        return [model.trunk]

    def groups(self, model):
        return [
            ParamGroup(list(model.trunk.parameters()), "trunk", lr_scale=0.5, weight_decay=0.1, clip=0.05),
            ParamGroup(list(model.out.parameters()), "out", clip=self.config.optim.clip),
        ]

    def buffers(self, model):
        return dict(model.named_buffers())

    def manifest(self):
        return {"hidden": self.config.tiny.hidden}

    def open_data(self, folder, start, samples_per_step):
        if slow := self.config.tiny.slow:
            for _ in progress_bar(range(int(10 * slow[self.world.rank])), desc="opening"):
                time.sleep(0.1)

    def _batch(self, *seed):
        generator = torch.Generator().manual_seed(hash((self.config.run.seed, *seed)) % 2**31)
        x = torch.randn(self.config.tiny.batch, 8, generator=generator)
        share = torch.rand((), generator=generator)
        mask = (torch.rand(len(x), 4, generator=generator) < share) & (x[:, :4] > -1.5)
        return {"x": x, "y": torch.sin(x[:, :4] * 2), "mask": mask}

    def batches(self, start, stop):
        first = self.world.rank * self.batches_per_step
        for step in range(start, stop):
            for part in range(first, first + self.batches_per_step):
                if step + 1 == self.config.tiny.fails_at and self.world.rank == self.world.size - 1:
                    raise FastmumError("the data are damaged")
                yield self._batch(step, part)

    def loss(self, model, batch):
        difference = (model(batch["x"]).float() - batch["y"]) * batch["mask"]
        mae = difference.detach().abs().sum(0), batch["mask"].sum(0)
        return StepOutput(difference.square().sum(), batch["mask"].sum(), metrics={"mae": mae})

    @property
    def evaluates(self):
        return True

    @torch.no_grad()
    def evaluate(self, model):
        output = self.loss(model, to_device(self._batch(-1), self.world.device))
        return {"held_out_loss": float(output.loss_sum / output.weight)}
