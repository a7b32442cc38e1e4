"""A task whose model has a pretrained encoder, frozen or finetuned, and whose batches are frames with cameras."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastmum.engine.device import to_device
from fastmum.engine.task import StepOutput
from fastmum.model.compile import eager
from fastmum.model.encoder import Encoder
from fastmum.tasks.loader_task import LoaderTask
from fastmum.tasks.trained import choose_encoder, task_encoder, weights_digest


class EncoderTask(LoaderTask):
    """The operations that all such tasks share. The section `model` of their configuration is an `EncoderSection`."""

    _held_out: dict[int, Any]  # batches of this process, by number (`held_out_plans`)

    def load_encoder(self) -> Encoder:
        """The encoder of the configuration; ConfigError if the data do not fit it."""
        settings = self.config.model
        encoder = task_encoder(settings, choose_encoder(settings))
        self._patch = encoder.config.patch_size
        self._frozen = None if settings.finetune else weights_digest(encoder)
        self.config.data.check(self._patch)
        return encoder

    def manifest(self) -> dict[str, Any]:
        """Sizes, and the digest of a frozen encoder, which checkpoints do not contain."""
        sizes = dataclasses.asdict(self.config.model.sizes(1, self._patch))
        lists = {name: [*value] if isinstance(value, tuple) else value for name, value in sizes.items()}
        return lists | {"frozen_encoder": self._frozen}

    def prepare(self) -> None:
        """Read the held-out batches of this process."""
        plans = self.held_out_plans()
        self._held_out = dict(zip(plans, self._loader.batches(plans.values(), self.stopping), strict=True))

    def mean_of_batches(self, losses: Mapping[str, Tensor]) -> StepOutput:
        """The loss `objective` of a micro-batch, of which that of a step is the mean, and the terms in `metrics`."""
        one = torch.ones_like(losses["objective"]).detach()
        terms = {name: (losses[name].detach(), one) for name in self.metrics}
        return StepOutput(losses["objective"], 1.0, float(self.batches_per_step * self.world.size), terms)

    @abstractmethod
    def predict(self, model: Any, batch: Any) -> Any:
        """What evaluation and pictures need of a batch on the device."""

    def evaluated(self, model: Any, batch: Any) -> Any:
        """`predict` for a held-out batch, uncompiled."""
        with eager(model):
            return self.predict(model, to_device(batch, self.world.device))

    @abstractmethod
    def draw(self, batch: Any, found: Any, title: str) -> dict[str, Image.Image]:
        """Pictures by name of a batch and of what `predict` found."""

    @torch.no_grad()
    def pictures(self, model: Any, step: int) -> dict[str, Image.Image]:
        """Those of the first held-out batch; none without one."""
        if not self._held_out:
            return {}
        batch = self._held_out[min(self._held_out)]
        return self.draw(batch, self.evaluated(model, batch), f"step {step:,}")
