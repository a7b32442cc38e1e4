"""Training of relative pose on pairs of frames with cameras."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastmum.data.scene_loader import SceneBatch
from fastmum.engine.distributed import DistContext
from fastmum.engine.task import Metric, ParamGroup, Samples, StepOutput
from fastmum.model.block import Block as EncoderBlock
from fastmum.model.compile import compile_kinds
from fastmum.model.encoder import Encoder
from fastmum.tasks.encoder_task import EncoderTask
from fastmum.tasks.pairs import PairSplits, open_pairs
from fastmum.tasks.pose.config import Config as RunConfig
from fastmum.tasks.pose.losses import pose_errors, true_poses
from fastmum.tasks.pose.model import Block, Poses, RelativePose, frame_flops
from fastmum.tasks.pose.pictures import draw_pairs, views_of
from fastmum.tasks.pose.rotation import nearest_rotation
from fastmum.tasks.pose.scores import Errors, errors_of, scores_of

log = logging.getLogger(__name__)


class PoseTask(EncoderTask):
    """The pose of each view of a pair in the other. A step's loss is the mean over its pairs."""

    Config = RunConfig
    config: RunConfig
    shown = "loss", "held_out_loss", "auc20", "rotation_median", "rotation_median_of_mean_pose"
    metrics: Mapping[str, Metric] = {name: Metric() for name in ("rotation_error", "direction_error")}

    def __init__(self, config: RunConfig, world: DistContext) -> None:
        super().__init__(config, world)
        data = config.data
        keys = "data.pairs_per_batch", "data.pairs_per_step"
        self.samples = Samples(data.pairs_per_batch, data.pairs_per_step, "pairs", keys)
        self._splits: PairSplits
        self._mean: Poses  # of the training pairs

    def build(self) -> RelativePose:
        """Load the encoder and build the rest; ConfigError if sizes do not fit."""
        settings, device, encoder = self.config.model, self.world.device, self.load_encoder()
        sizes = settings.sizes(encoder.embed_dim, self._patch)
        model = RelativePose(sizes, encoder, settings.normalisation == "half").to(device)
        recompute = settings.recompute
        if recompute == "auto":
            recompute = "mlp" if device.type == "cuda" else "none"
        model.set_recompute(recompute)
        config, prefix, finetune = encoder.config, encoder.options.prefix, settings.finetune
        self._flops = cache(lambda grid: 2 * frame_flops(sizes, grid, config, prefix, finetune))
        return model

    def blocks(self, model: RelativePose) -> list[nn.Module]:
        every = [*cast(Encoder, model.encoder).blocks, *model.decoder.blocks]
        return [block for block in every if any(p.requires_grad for p in block.parameters())]

    def exact(self, model: RelativePose) -> list[nn.Module]:
        return [model.head]

    def groups(self, model: RelativePose) -> list[ParamGroup]:
        """The encoder has its own learning rate; biases, norms and other 1-D parameters do not decay."""
        optim, scale = self.config.optim, self.config.model.encoder_lr_scale
        parts = {"encoder": (model.encoder, scale), "decoder": (model.decoder, 1.0), "head": (model.head, 1.0)}
        groups = []
        for name, (module, lr_scale) in parts.items():
            every = [p for p in cast(nn.Module, module).parameters() if p.requires_grad]
            if every:
                groups.append(ParamGroup(every, name, lr_scale, optim.weight_decay, clip=optim.clip))
        return groups

    def manifest(self) -> dict[str, Any]:
        """With the normalisation of images."""
        return super().manifest() | {"normalisation": self.config.model.normalisation}

    def compile(self, model: RelativePose, steps: int) -> None:
        """Compile the blocks of encoder and decoder; ConfigError for CUDA graphs."""
        super().compile(model, steps)
        compile_kinds(model.modules(), (EncoderBlock, Block), self.config.model.compile, self.world.device, steps)

    def open_data(self, folder: Path, start: int, samples_per_step: int) -> None:
        """Open manifests and planners; DataError if the data cannot be used."""
        data, resumed = self.config.data, start > 0 or not self.world.is_main
        micro_batches = samples_per_step // data.pairs_per_batch
        self._splits = open_pairs(data, folder, self.config.run.seed, resumed, micro_batches)
        self._loader = self._splits.loader(data, folder / "bad_frames.log", self.world.size)

    def prepare(self) -> None:
        """With the mean pose of as many training batches as an evaluation has, which knows nothing of the images."""
        super().prepare()
        if not self._held_out:
            return
        planner, manifests = self._splits.training, self._splits.manifests
        rows = np.concatenate([planner.plan(i).rows for i in range(self.config.train.eval_batches)])
        poses = torch.from_numpy(np.stack([cast(np.ndarray, manifests.camera_arrays(row)[1]) for row in rows.tolist()]))
        R, t = (x[1::2] for x in true_poses(poses.double()))
        mean = nn.functional.normalize(t, dim=1).mean(0, keepdim=True)
        self._mean = Poses(nearest_rotation(R.mean(0, keepdim=True)), mean)

    def predict(self, model: RelativePose, batch: SceneBatch) -> tuple[Poses, tuple[Tensor, Tensor]]:
        """Poses, and the angles of both parts of the loss, (F,) each."""
        found = model(batch.images)
        with torch.autocast(batch.images.device.type, enabled=False):
            return found, pose_errors(found, true_poses(batch.camera_from_world))

    def loss(self, model: RelativePose, batch: SceneBatch) -> StepOutput:
        """Mean over the pairs of the step: for each the sum of both angles in both directions, radians."""
        _, angles = self.predict(model, batch)
        pairs = float(len(batch.lengths))
        count = torch.full((), 2 * pairs, device=batch.images.device)
        means = {name: (torch.rad2deg(a.detach()).sum(), count) for name, a in zip(self.metrics, angles, strict=True)}
        total = pairs * self.batches_per_step * self.world.size
        return StepOutput((angles[0] + angles[1]).sum(), pairs, total, means)

    def sizes(self, batch: SceneBatch) -> tuple[int, float]:
        grid = batch.images.shape[1] // self._patch, batch.images.shape[2] // self._patch
        return len(batch.lengths), len(batch.lengths) * self._flops(grid)

    @torch.no_grad()
    def evaluate(self, model: RelativePose) -> dict[str, float]:
        """Loss and scores of the held-out pairs, sharded over the processes: pose of view 2 in view 1, as inference.

        `*_of_mean_pose` are the scores of the mean pose of the training pairs.
        """
        count, pairs = self.config.train.eval_batches, self.config.data.pairs_per_batch
        # Angles of the loss in both directions; errors of the prediction, then of the mean pose. Each process fills
        # in its batches, and the sum has all.
        filled = torch.zeros(count, pairs, 5, dtype=torch.float64)
        for i, batch in self._held_out.items():
            found, angles = self.evaluated(model, batch)
            if i < count:
                true = [x[1::2].double().numpy() for x in true_poses(batch.camera_from_world)]
                own = errors_of(*(x[1::2].double().cpu().numpy() for x in found), *true)
                trivial = errors_of(*(x.expand(pairs, *x.shape[1:]).numpy() for x in self._mean), *true)
                filled[i, :, 0] = (angles[0] + angles[1]).view(pairs, 2).sum(1).double().cpu()
                filled[i, :, 1:] = torch.from_numpy(np.stack([*own, *trivial], 1))
        filled = filled.to(self.world.device)
        self.world.sum_(filled)
        loss, *errors = filled.cpu().flatten(0, 1).numpy().T
        trivial_scores = scores_of(Errors(*errors[2:]))
        scores = {"held_out_loss": float(loss.mean())} | scores_of(Errors(*errors[:2]))
        scores |= {f"{name}_of_mean_pose": value for name, value in trivial_scores.items()}
        log.info("held-out pairs: %s", ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        return scores

    def draw(self, batch: SceneBatch, found: Any, title: str) -> dict[str, Image.Image]:
        """Epipolar lines, predicted and true."""
        poses, _ = found
        return {"pose": draw_pairs(views_of(batch, poses), title)}
