"""Training of dense matching on pairs of frames with depth and cameras."""

import logging
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastmum.data.pair_loader import square_view
from fastmum.data.scene_loader import SceneBatch
from fastmum.engine.distributed import DistContext
from fastmum.engine.task import Metric, ParamGroup, Samples, StepOutput
from fastmum.files import expand_user
from fastmum.model.compile import compile_kinds
from fastmum.tasks.encoder_task import EncoderTask
from fastmum.tasks.pairs import PairSplits, open_pairs
from fastmum.tasks.roma.coarse import Block
from fastmum.tasks.roma.config import RANDOM
from fastmum.tasks.roma.config import Config as RunConfig
from fastmum.tasks.roma.data import RomaPlanner
from fastmum.tasks.roma.decoder import COARSE, STRIDES, Refiner, ScaleOutput
from fastmum.tasks.roma.losses import TrueWarp, losses_of, true_warps
from fastmum.tasks.roma.model import Roma, pair_flops
from fastmum.tasks.roma.pictures import draw_matches
from fastmum.tasks.roma.scores import Scores

log = logging.getLogger(__name__)

COMPILED = Block, Refiner


class RomaTask(EncoderTask):
    """Dense warps from the first image of a pair to the second.

    Statistics of batch norm are those of a micro-batch, so its loss is no sum over its pairs: a step's loss is the mean
    over its micro-batches, as RoMa's is the mean over devices. Running statistics are averaged over processes.
    """

    Config = RunConfig
    config: RunConfig
    shown = "loss", "held_out_loss", "epe", "pck5", "certainty_bce", "certainty_bce_of_constant"

    def __init__(self, config: RunConfig, world: DistContext) -> None:
        super().__init__(config, world)
        data = config.data
        keys = "data.pairs_per_batch", "data.pairs_per_step"
        self.samples = Samples(data.pairs_per_batch, data.pairs_per_step, "pairs", keys)
        terms = [f"anchors_{COARSE}", f"anchor_certainty_{COARSE}"]
        terms += [f"{term}_{stride}" for stride in STRIDES for term in ("regression", "certainty")]
        self.metrics: Mapping[str, Metric] = {name: Metric() for name in (*terms, "pck")}  # type: ignore[misc]
        self._splits: PairSplits

    def build(self) -> Roma:
        """Load the encoders and build the rest; ConfigError if sizes do not fit."""
        settings, encoder = self.config.model, self.load_encoder()
        sizes = settings.sizes(encoder.embed_dim, self._patch)
        model = Roma(sizes, encoder).to(self.world.device)
        if settings.fine == RANDOM:
            log.info("the fine encoder starts from random weights; model.fine names a file of torchvision's vgg19_bn")
        else:
            model.cnn.load(expand_user(settings.fine))
        self._flops = cache(lambda side: pair_flops(sizes, encoder.config, side))
        return model

    def blocks(self, model: Roma) -> list[nn.Module]:
        return [*model.decoder.embedding_decoder.blocks]

    def exact(self, model: Roma) -> list[nn.Module]:
        return model.decoder.exact()

    def groups(self, model: Roma) -> list[ParamGroup]:
        """RoMa's: the fine encoder has its own learning rate; everything decays, and is clipped together."""
        optim, scale = self.config.optim, self.config.model.fine_lr_scale
        parts = {"fine": (model.cnn, scale), "decoder": (model.decoder, 1.0)}
        return [
            ParamGroup([*module.parameters()], name, lr_scale, optim.weight_decay, True, optim.clip, True)
            for name, (module, lr_scale) in parts.items()
        ]

    def buffers(self, model: Roma) -> dict[str, Tensor]:
        """Running statistics of batch norm."""
        return {name: x for name, x in model.named_buffers() if name.endswith(("running_mean", "running_var"))}

    def compile(self, model: Roma, steps: int) -> None:
        """Compile the coarse blocks and the refiners' convolutions; ConfigError for CUDA graphs."""
        super().compile(model, steps)
        compile_kinds(model.modules(), COMPILED, self.config.model.compile, self.world.device, steps)

    def open_data(self, folder: Path, start: int, samples_per_step: int) -> None:
        """Open manifests and planners; DataError if the data cannot be used."""
        data, resumed = self.config.data, start > 0 or not self.world.is_main
        planner = partial(RomaPlanner, second_overlap=data.second_overlap)
        micro_batches = samples_per_step // data.pairs_per_batch
        self._splits = open_pairs(data, folder, self.config.run.seed, resumed, micro_batches, True, planner)
        self._loader = self._splits.loader(data, folder / "bad_frames.log", self.world.size, square_view)

    def predict(self, model: Roma, batch: SceneBatch) -> tuple[dict[int, ScaleOutput], list[TrueWarp]]:
        """Outputs from the first to the second images, and true warps of the same sizes."""
        outputs = model(torch.cat([batch.images[0::2], batch.images[1::2]]))
        T = batch.camera_from_world.double()
        b_from_a = T[1::2] @ torch.linalg.inv_ex(T[0::2]).inverse
        depth, K, sizes = batch.depth, batch.intrinsics, [tuple(out.flow.shape[2:]) for out in outputs.values()]
        return outputs, true_warps(depth[0::2], depth[1::2], K[0::2], K[1::2], b_from_a, sizes)

    def loss(self, model: Roma, batch: SceneBatch) -> StepOutput:
        """The mean over the micro-batches of the step."""
        outputs, truth = self.predict(model, batch)
        with torch.autocast(batch.images.device.type, enabled=False):
            return self.mean_of_batches(losses_of(outputs, truth))

    def sizes(self, batch: SceneBatch) -> tuple[int, float]:
        return len(batch.lengths), len(batch.lengths) * self._flops(batch.images.shape[1])

    @torch.no_grad()
    def evaluate(self, model: Roma) -> dict[str, float]:
        """Loss and `Scores` of the held-out pairs, sharded over the processes."""
        scores = Scores(self.world)
        for i, batch in self._held_out.items():
            outputs, truth = self.evaluated(model, batch)
            if i < self.config.train.eval_batches:
                scores.add(outputs, truth)
        found = scores.compute()
        log.info("held-out pairs: %s", ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        return found

    def evaluated(self, model: Roma, batch: SceneBatch) -> tuple[dict[int, ScaleOutput], list[TrueWarp]]:
        """In eval mode: with running statistics."""
        model.eval()
        try:
            return super().evaluated(model, batch)
        finally:
            model.train()

    def draw(self, batch: SceneBatch, found: Any, title: str) -> dict[str, Image.Image]:
        """Warps, certainties and errors."""
        outputs, truth = found
        return {"matches": draw_matches(batch.images, outputs[1], truth[-1], title)}
