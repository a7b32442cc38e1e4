"""The mean loss and the pace of training between two log steps, and the steps that were passed over.

Everything is added up on the device; steps between log steps do not wait for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastmum.data.loader import Loader
from fastmum.engine.distributed import DistContext

MOST_VIEWS = 256  # longer sequences are counted as this


def no_losses(device: torch.device) -> Tensor:
    """Losses of frames added up, and frames, by views of their sequence: none yet, (2, MOST_VIEWS + 1) float64."""
    return torch.zeros(2, MOST_VIEWS + 1, dtype=torch.float64, device=device)


class Meter:
    """Losses of all processes, by the number of views of a sequence.

    Args:
        world: of the processes.
        loader: whose waiting time is reported.
    """

    def __init__(self, world: DistContext, loader: Loader) -> None:
        self._world, self._loader = world, loader
        self._totals = no_losses(world.device)  # of this process
        self._views = torch.arange(MOST_VIEWS + 1, device=world.device)
        self._frames, self._seconds, self._waited = 0, 0.0, loader.wait_seconds
        self._began = time.perf_counter()

    def totals_of(self, losses: Tensor, views: Tensor) -> Tensor:
        """What a batch adds to the totals.

        Args:
            losses: (F,) of frames.
            views: (F,) int64, frames of the sequence that each belongs to.
        """
        # A product adds up in the same order every time; index_add on CUDA does not.
        which = (views.clamp(max=MOST_VIEWS)[:, None] == self._views).double()
        return torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)]) @ which

    def add(self, totals: Tensor, found_inf: Tensor, frames: int) -> None:
        """Count a step of this process.

        Args:
            totals: sum of `totals_of` its batches.
            found_inf: 0-d, 1 where the step was passed over: it is then not part of the mean.
            frames: of all processes.
        """
        self._totals += torch.where(found_inf > 0, 0.0, totals)
        self._frames += frames

    def read(self, *others: Tensor) -> tuple[dict[str, float | None], float, int, list[list[float]]]:
        """The only wait for the device; starts anew.

        Args:
            others: small tensors to read in the same transfer, the same on all processes.

        Returns:
            "loss", the mean over frames, and "loss/views_<S>" where there were any; None where all steps were passed
            over. "frames_per_s" of all processes, and "data_wait", the share of time that this one waited for data.
            Then seconds of training and frames that all this covers, and what was in the others.
        """
        totals = self._summed()
        values = torch.cat([totals.flatten(), *(x.double().flatten() for x in others)]).tolist()
        columns = totals.shape[1]
        losses, frames, rest = values[:columns], values[columns : 2 * columns], values[2 * columns :]
        counted = sum(frames)
        metrics: dict[str, float | None] = {"loss": sum(losses) / counted if counted else None}
        metrics |= {
            f"loss/views_{views}": loss / count
            for views, (loss, count) in enumerate(zip(losses, frames, strict=True))
            if count
        }
        seconds, seen = self._seconds + time.perf_counter() - self._began, self._frames
        metrics["frames_per_s"] = seen / seconds
        metrics["data_wait"] = (self._loader.wait_seconds - self._waited) / seconds
        self._totals.zero_()
        self._frames, self._seconds, self._waited = 0, 0.0, self._loader.wait_seconds
        self._began = time.perf_counter()
        lists = [[rest.pop(0) for _ in range(x.numel())] for x in others]
        return metrics, seconds, seen, lists

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the pace: it is not training."""
        self._seconds += time.perf_counter() - self._began
        try:
            yield
        finally:
            self._began = time.perf_counter()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to continue the mean, of all processes together."""
        return {"meter.totals": self._summed()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue the mean; the first process takes what all had."""
        if self._world.is_main:
            self._totals.copy_(state["meter.totals"])

    def _summed(self) -> Tensor:
        totals = self._totals.clone()
        self._world.sum_(totals)
        return totals
