"""Training of feedforward reconstruction on frames with depth and cameras."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from fastmum.attention import AttentionError, Segments, choose_backend
from fastmum.attention.backend import ragged_lengths
from fastmum.config.schema import ConfigError
from fastmum.data.scene_loader import SceneBatch
from fastmum.engine.device import MATRIX_DTYPE
from fastmum.engine.distributed import DistContext
from fastmum.engine.task import Metric, ParamGroup, Samples, StepOutput
from fastmum.model.block import Block as EncoderBlock
from fastmum.model.compile import compile_kinds
from fastmum.model.encoder import Encoder
from fastmum.tasks.encoder_task import EncoderTask
from fastmum.tasks.reconstruction.aggregator import Sequences
from fastmum.tasks.reconstruction.block import Block
from fastmum.tasks.reconstruction.config import Config as RunConfig
from fastmum.tasks.reconstruction.data import SceneSplits, open_scenes
from fastmum.tasks.reconstruction.flops import frame_flops, square_flops
from fastmum.tasks.reconstruction.losses import Prediction, Scene, losses_of, normalise_scenes, unproject
from fastmum.tasks.reconstruction.model import Reconstruction
from fastmum.tasks.reconstruction.pictures import SceneViews, draw_scenes
from fastmum.tasks.reconstruction.scores import Scores

log = logging.getLogger(__name__)

DENSE_TERMS = "confidence", "error", "gradient"
CAMERA_TERMS = "camera", "translation", "rotation", "fov"


class ReconstructionTask(EncoderTask):
    """Cameras, depth and points of the frames of a scene.

    The loss of a micro-batch is not a sum over its pixels or frames: it drops the largest errors of the batch, and its
    terms have different counts. A step's loss is the mean over its micro-batches, as VGGT's is the mean over devices.
    Since a step is planned in micro-batches, it does not depend on the number of processes.
    """

    Config = RunConfig
    config: RunConfig
    shown = "loss", "held_out_loss", "auc30", "abs_rel", "abs_rel_of_mean_depth"
    ground_truth = True  # whether frames have depth and cameras

    def __init__(self, config: RunConfig, world: DistContext) -> None:
        super().__init__(config, world)
        data = config.data
        keys = "data.frames_per_batch", "data.frames_per_step"
        self.samples = Samples(data.frames_per_batch, data.frames_per_step, "frames", keys)
        dense = ("depth", "points") if config.model.points else ("depth",)
        terms = *CAMERA_TERMS, *(f"{kind}_{term}" for kind in dense for term in DENSE_TERMS)
        self.metrics: Mapping[str, Metric] = {term: Metric() for term in terms}  # type: ignore[misc]
        self._splits: SceneSplits

    def build(self) -> Reconstruction:
        """Load the encoder and build the rest; ConfigError if sizes do not fit, or `model.attention` does not run."""
        settings, device, encoder = self.config.model, self.world.device, self.load_encoder()
        sizes = settings.sizes(encoder.embed_dim, self._patch)
        model = Reconstruction(sizes, encoder).to(device)
        self._choose_attention(model)
        recompute = settings.recompute
        if recompute == "auto":
            recompute = "blocks" if device.type == "cuda" else "none"
        model.set_recompute(recompute)
        for head in model.dense_heads():
            head.chunk = settings.chunk
        per_frame = cache(lambda grid: frame_flops(sizes, grid, encoder.config, settings.finetune))
        self._flops = lambda grid, lengths: per_frame(grid) * sum(lengths) + square_flops(sizes, grid, lengths)
        return model

    def _choose_attention(self, model: Reconstruction) -> None:
        device, dtype, data = self.world.device, MATRIX_DTYPE[self.config.train.precision], self.config.data
        try:
            backend = choose_backend(self.config.model.attention, device, dtype)
        except AttentionError as error:
            raise ConfigError(f"model.attention: {error}") from None
        sizes, frames, longest = model.config, data.frames_per_batch, data.views[1]
        tokens = model.aggregator.special + (data.image_size // sizes.patch_size) ** 2
        batch = Segments.of_frames(ragged_lengths(frames, longest), frames, tokens, tokens, longest)
        width = sizes.embed_dim // sizes.num_heads
        log.info("global attention: %s", backend.prepare(device, dtype, sizes.num_heads, width, batch))
        model.aggregator.attention = backend.name

    def blocks(self, model: Reconstruction) -> list[nn.Module]:
        return [block for block in self._stacks(model) if any(p.requires_grad for p in block.parameters())]

    def _stacks(self, model: Reconstruction) -> list[nn.Module]:
        encoder = cast(Encoder, model.encoder)
        return [*encoder.blocks, *model.aggregator.frame_blocks, *model.aggregator.global_blocks]

    def exact(self, model: Reconstruction) -> list[nn.Module]:
        return [model.camera_head, *model.dense_heads()]

    def groups(self, model: Reconstruction) -> list[ParamGroup]:
        """VGGT's groups, which are clipped one by one; everything decays.

        A finetuned encoder is in the aggregator's, as there, unless it has another learning rate.
        """
        optim, scale = self.config.optim, self.config.model.encoder_lr_scale
        parts: dict[str, list[nn.Module | None]] = {
            "encoder": [model.encoder], "aggregator": [model.aggregator], "camera": [model.camera_head],
            "depth": [model.depth_head], "points": [model.point_head],
        }  # fmt: skip
        if scale == 1.0:
            parts["aggregator"] = parts.pop("encoder") + parts["aggregator"]
        groups = []
        for name, modules in parts.items():
            every = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
            if every:
                lr_scale = scale if name == "encoder" else 1.0
                groups.append(ParamGroup(every, name, lr_scale, optim.weight_decay, True, optim.clip))
        return groups

    def compile(self, model: Reconstruction, steps: int) -> None:
        """Compile the blocks, for frames of any number and size; ConfigError for CUDA graphs."""
        super().compile(model, steps)
        kinds, mode = (Block, EncoderBlock), self.config.model.compile
        compile_kinds(self._stacks(model), kinds, mode, self.world.device, steps, dynamic=True)

    def open_data(self, folder: Path, start: int, samples_per_step: int) -> None:
        """Open manifests, planners and decoder; DataError if the data cannot be used."""
        config, resumed = self.config, start > 0 or not self.world.is_main
        micro_batches = samples_per_step // config.data.frames_per_batch
        self._splits = open_scenes(
            config.data, folder, config.run.seed, self._patch, resumed, micro_batches, self.ground_truth
        )
        self._loader = self._splits.loader(config.data, folder / "bad_frames.log", self.world.size)

    def prepare(self) -> None:
        """With the mean depth of training."""
        super().prepare()
        if self._held_out and self.ground_truth:
            self._mean_depth = self._mean_training_depth()

    def _mean_training_depth(self) -> float:
        """Mean normalised depth of as many training batches as an evaluation has, which predicts every pixel alike."""
        count, size = self.config.train.eval_batches, self.world.size
        depths = torch.zeros(2, dtype=torch.float64)
        plans = [self._splits.training.plan(i) for i in range(self.world.rank, count, size)]
        for batch in self._loader.batches(plans, self.stopping):
            depth = self.truth(batch).depth[batch.valid]
            depths += torch.tensor([depth.sum(), len(depth)])
        depths = depths.to(self.world.device)
        self.world.sum_(depths)
        return float(depths[0] / depths[1].clamp(min=1))

    def predict(self, model: Reconstruction, batch: SceneBatch) -> tuple[Prediction, Scene, dict[str, Tensor]]:
        """Prediction, normalised truth, and all terms of the loss."""
        sequences = Sequences.of(batch.lengths, batch.images.device)
        longest = max(self.config.data.views[1], *batch.lengths)
        prediction = model(batch.images, batch.lengths, longest)
        with torch.autocast(batch.images.device.type, enabled=False):
            truth = self.truth(batch)
            return prediction, truth, losses_of(prediction, truth, sequences, self.config.weights)

    def truth(self, batch: SceneBatch) -> Scene:
        """The normalised truth of a batch."""
        points = unproject(batch.depth, batch.intrinsics, batch.camera_from_world)
        truth = Scene(batch.camera_from_world, batch.intrinsics, batch.depth, points, batch.valid)
        return normalise_scenes(truth, Sequences.of(batch.lengths, batch.images.device))

    def loss(self, model: Reconstruction, batch: SceneBatch) -> StepOutput:
        """The mean over the micro-batches of the step."""
        _, _, losses = self.predict(model, batch)
        return self.mean_of_batches(losses)

    def sizes(self, batch: SceneBatch) -> tuple[int, float]:
        grid = batch.images.shape[1] // self._patch, batch.images.shape[2] // self._patch
        return sum(batch.lengths), self._flops(grid, batch.lengths)

    @torch.no_grad()
    def evaluate(self, model: Reconstruction) -> dict[str, float]:
        """Loss, and scores of cameras and depth, over the held-out batches, sharded over the processes."""
        scores = Scores(self.world, self._mean_depth)
        for i, batch in self._held_out.items():
            prediction, truth, losses = self.evaluated(model, batch)
            if i < self.config.train.eval_batches:
                scores.add(prediction, truth, batch.lengths, losses["objective"])
        found = scores.compute()
        log.info("held-out scenes: %s", ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        return found

    def draw(self, batch: SceneBatch, found: Any, title: str) -> dict[str, Image.Image]:
        """Depth, its errors, cameras and points."""
        prediction, truth, _ = found
        return {"reconstruction": draw_scenes(SceneViews.of_batch(batch, prediction, truth), title)}
