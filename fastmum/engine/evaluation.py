"""The held-out loss and the reconstruction picture of a run."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from fastmum.config import Config
from fastmum.data.crops import whole_frames
from fastmum.data.loader import Loader
from fastmum.data.plan import StepPlan
from fastmum.data.splits import DataSplits
from fastmum.engine.compile import eager
from fastmum.engine.distributed import DistContext
from fastmum.engine.pictures import draw_reconstruction
from fastmum.engine.prefetcher import StepBatch, noise_for
from fastmum.engine.step import forward
from fastmum.model.mum import MuM, MuMOutput

EVAL_SEED = 0  # of the masks; not the run's, so that runs of different seeds can be compared
PICTURE_SEQUENCES = 3
PICTURE_VIEWS = 6


class Evaluation:
    """Evaluates on the same batches with the same masks every time; their frames are decoded once and kept.

    The processes share the batches between them. All call the same functions, since weights may be shared out.

    Args:
        sources: of the run; nothing may be held out.
        loader: decodes their frames.
        config: of the run.
        world: of the processes.
    """

    def __init__(self, sources: DataSplits, loader: Loader, config: Config, world: DistContext) -> None:
        self._config, self._world = config, world
        count = config.train.eval_batches if sources.held_out else 0
        rounds = -(-count // world.size)
        # As many rounds for every process; who has no batch left takes the last one again, and does not count it.
        self._batches = {
            i: self._batch(loader, sources.held_out.plan(min(i, count - 1)), min(i, count - 1))
            for i in range(world.rank, rounds * world.size, world.size)
        }
        self._count = count
        self._picture = self._batch(loader, _picture_plan(sources, config.data.frames_per_batch), 0)

    @property
    def has_held_out(self) -> bool:
        """Whether there is a held-out loss."""
        return self._count > 0

    @torch.no_grad()
    def held_out_loss(self, model: MuM) -> float:
        """Masked loss, averaged over frames."""
        total = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        for i, batch in self._batches.items():
            losses = self._output(model, batch).loss.double()
            if i < self._count:
                total += torch.stack([losses.sum(), torch.ones_like(losses).sum()])
        self._world.sum_(total)
        loss, frames = total.tolist()
        return loss / frames

    @torch.no_grad()
    def picture(self, model: MuM) -> Image.Image:
        """Originals, masked frames and predictions of a few sequences."""
        batch = self._picture
        output = self._output(model, batch)
        frames, masked_ids, pred = batch.frames.cpu(), output.masked_ids.cpu(), output.pred.float().cpu()
        return draw_reconstruction(frames, batch.lengths, masked_ids, pred)

    def _batch(self, loader: Loader, plan: StepPlan, index: int) -> StepBatch:
        frames, lengths = loader.load(plan)
        noise = noise_for(self._config, EVAL_SEED, index, len(frames))
        views = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))
        return StepBatch(frames, lengths, noise, views, len(frames))

    def _output(self, model: MuM, batch: StepBatch) -> MuMOutput:
        with eager(model):
            return forward(model, batch.to(self._world.device), self._config)


def _picture_plan(sources: DataSplits, max_frames: int) -> StepPlan:
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
