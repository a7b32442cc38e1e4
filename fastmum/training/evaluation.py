"""The held-out loss and the reconstruction picture of a run."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmum.config import Config
from fastmum.data.loader import Batch, Loader
from fastmum.data.plan import StepPlan, StepPlanner, whole_frame
from fastmum.data.sequences import Sequences
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
        held_out: planner of the held-out sequences, None where nothing is held out.
        shown: sequences to draw pictures from.
    """

    def __init__(
        self, held_out: StepPlanner | None, shown: Sequences, loader: Loader, config: Config, device: torch.device
    ) -> None:
        self.config, self.device = config, device
        plans = [held_out.plan(i) for i in range(config.train.eval_batches)] if held_out else []
        self._batches = [loader.load(plan) for plan in plans]
        self._picture = loader.load(_picture_plan(shown, config.data.frames_per_batch))

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
        return draw_reconstruction(batch.frames, batch.lengths, output.masked_ids.cpu(), output.pred.float().cpu())

    def _output(self, model: MuM, batch: Batch, index: int) -> MuMOutput:
        noise = noise_for(self.config, EVAL_SEED, index, len(batch.frames))
        with eager():
            return forward(model, batch, noise, self.config, self.device)


def _picture_plan(shown: Sequences, max_frames: int) -> StepPlan:
    """A few views of a few sequences, neighbours of one another, whole."""
    which = np.linspace(0, len(shown) - 1, min(PICTURE_SEQUENCES, len(shown))).round().astype(int)
    views = max(1, min(PICTURE_VIEWS, max_frames // len(which)))
    picked = []
    for i in which:
        frames = shown.frames[i]
        stride = max(1, len(frames) // (2 * views))
        picked.append(frames[: views * stride : stride])
    files = tuple(file for frames in picked for file in frames)
    spare = tuple(shown.frames[i] for i, frames in zip(which, picked, strict=True) for _ in frames)
    return StepPlan(files, spare, tuple(map(len, picked)), tuple(whole_frame() for _ in files))
