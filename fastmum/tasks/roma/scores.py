"""Scores of warps of held-out pairs during training."""

import math
from typing import Any

import torch
from torch import Tensor

from fastmum.engine.distributed import DistContext
from fastmum.tasks.roma.coarse import anchor_flow
from fastmum.tasks.roma.decoder import COARSE, ScaleOutput
from fastmum.tasks.roma.losses import TrueWarp, losses_of

PCK = (1, 3, 5)  # pixels


def pixel_errors(flow: Tensor, points: Tensor) -> Tensor:
    """Distances in pixels of the map, (B, h, w), of warps (B, 2, h, w) each."""
    size = torch.tensor(flow.shape[:1:-1], device=flow.device)[:, None, None]
    return ((flow - points) * size / 2).norm(dim=1)


class Scores:
    """Sums over batches and processes. Errors are in pixels of the training images, over pixels with a true warp."""

    def __init__(self, world: DistContext) -> None:
        self._world = world
        # Loss, batches; visible pixels of stride 1, their error, those below each bound; of the coarse stride, with the
        # error of the anchors; pixels, their certainty's loss, those that count as certain.
        self._sums = torch.zeros(2 + 2 + len(PCK) + 2 + 3, dtype=torch.float64)

    @torch.no_grad()
    def add(self, outputs: dict[int, ScaleOutput], truth: list[TrueWarp]) -> None:
        losses, coarse, fine = losses_of(outputs, truth), outputs[COARSE], outputs[1]
        assert coarse.anchor_logits is not None
        errors = pixel_errors(fine.flow, truth[-1].points)[truth[-1].visible]
        factor = fine.flow.shape[3] / coarse.flow.shape[3]
        rough = factor * pixel_errors(anchor_flow(coarse.anchor_logits), truth[0].points)[truth[0].visible]
        pixels = fine.certainty.numel()
        sums: tuple[Any, ...] = (
            losses["objective"], 1, len(errors), errors.sum(), *((errors < bound).sum() for bound in PCK),
            len(rough), rough.sum(), pixels, losses["certainty_1"] * pixels, losses["certain"],
        )  # fmt: skip
        self._sums += torch.tensor([float(x) for x in sums], dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        """`held_out_loss`; `epe` and `pck<n>` at stride 1; `epe_of_anchors` before any refinement; calibration.

        `certainty_bce` is the cross entropy of the certainty, `certainty_bce_of_constant` that of the best constant,
        the share of pixels that it should be certain of.
        """
        sums = self._sums.to(self._world.device)
        self._world.sum_(sums)
        loss, batches, visible, error, *below, coarse, rough, pixels, bce, certain = sums.tolist()
        scores = {"held_out_loss": loss / batches}
        if visible and coarse:
            scores |= {"epe": error / visible, "epe_of_anchors": rough / coarse}
            scores |= {f"pck{bound}": n / visible for bound, n in zip(PCK, below, strict=True)}
        share = certain / pixels
        constant = -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
        return scores | {"certainty_bce": bce / pixels, "certainty_bce_of_constant": constant}
