"""The held-out loss and the reconstruction picture of a run."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmum.config import Config
from fastmum.data.crops import whole_frames
from fastmum.data.loader import Batch, Loader
from fastmum.data.plan import StepPlan
from fastmum.data.sources import Sources
from fastmum.model.masking import seeded_noise
from fastmum.model.mum import MuM, MuMOutput
from fastmum.training.compile import eager
from fastmum.training.pictures import draw_reconstruction

EVAL_SEED = 0  # of the masks; not the run's, so that runs of different seeds can be compared
PICTURE_SEQUENCES = 3
PICTURE_VIEWS = 6


def forward(model: MuM, batch: Batch, noise: Tensor, config: Config, device: torch.device) -> MuMOutput:
    """The model on one batch, in the precision of the run; used by training and evaluation alike."""
    frames, noise = (x.to(device, non_blocking=True) for x in (batch.frames, noise))
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        # The same for all batches of training; the picture may show more views.
        max_views = max(config.data.views[1], *batch.lengths)
        return model(frames, batch.lengths, config.model.mask_ratio, noise, max_views)


def noise_for(config: Config, seed: int, step: int, num_frames: int) -> Tensor:
    """Mask noise (F, P) for the frames of a run."""
    patches = (config.data.image_size // config.model_config.patch_size) ** 2
    return seeded_noise(seed, 0, step, num_frames, patches)


class Evaluation:
    """Evaluates on the same batches with the same masks every time; their frames are decoded once and kept.

    Args:
        sources: of the run; nothing may be held out.
        loader: decodes their frames.
        config, device: of the run.
    """

    def __init__(self, sources: Sources, loader: Loader, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        plans = [sources.held_out.plan(i) for i in range(config.train.eval_batches)] if sources.held_out else []
        self._batches = [loader.load(plan) for plan in plans]
        self._picture = loader.load(_picture_plan(sources, config.data.frames_per_batch))

    @property
    def has_held_out(self) -> bool:
        """Whether there is a held-out loss."""
        return bool(self._batches)

    @torch.no_grad()
    def held_out_loss(self, model: MuM) -> float:
        """Masked loss, averaged over frames."""
        total, frames = 0.0, 0
        for i, batch in enumerate(self._batches):
            total += self._output(model, batch, i).loss.item() * len(batch.frames)
            frames += len(batch.frames)
        return total / frames

    @torch.no_grad()
    def picture(self, model: MuM) -> Image.Image:
        """Originals, masked frames and predictions of a few sequences."""
        batch = self._picture
        output = self._output(model, batch, 0)
        frames, masked_ids, pred = batch.frames.cpu(), output.masked_ids.cpu(), output.pred.float().cpu()
        return draw_reconstruction(frames, batch.lengths, masked_ids, pred)

    def _output(self, model: MuM, batch: Batch, index: int) -> MuMOutput:
        noise = noise_for(self.config, EVAL_SEED, index, len(batch.frames))
        with eager(model):
            return forward(model, batch, noise, self.config, self.device)


def _picture_plan(sources: Sources, max_frames: int) -> StepPlan:
    """A few views of a few sequences, neighbours of one another, whole."""
    shown, starts = sources.shown, sources.manifests.starts
    which = np.linspace(0, len(shown) - 1, min(PICTURE_SEQUENCES, len(shown))).round().astype(int)
    views = max(1, min(PICTURE_VIEWS, max_frames // len(which)))
    picked = []
    for first, end in zip(starts[shown[which]].tolist(), starts[shown[which] + 1].tolist(), strict=True):
        stride = max(1, (end - first) // (2 * views))
        picked.append(np.arange(first, end)[: views * stride : stride])
    rows, lengths = np.concatenate(picked), np.array([len(rows) for rows in picked])
    return StepPlan(rows, lengths, whole_frames(len(rows)), np.zeros(len(rows), bool))
