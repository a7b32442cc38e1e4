"""Distillation: a student learns the cameras, depth and points that a frozen teacher predicts; no ground truth needed.

The loss is the sum of the L2 errors, without confidences, over all pixels, in the teacher's scale (supplement, Eq. 2
and its text; the equation's terms are those of Eq. 3).

Legend: F frames, (H, W) pixels of the student.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastmum.config.schema import ConfigError, key
from fastmum.data.scene_loader import SceneBatch
from fastmum.engine.device import autocast, to_device
from fastmum.engine.distributed import DistContext
from fastmum.engine.task import Metric, StepOutput
from fastmum.model.config import BACKWARD
from fastmum.model.options import normalise
from fastmum.progress import on_terminal, progress_bar
from fastmum.tasks.reconstruction.camera import decode_cameras
from fastmum.tasks.reconstruction.config import Config, ReconstructionSection
from fastmum.tasks.reconstruction.flops import frame_flops, square_flops
from fastmum.tasks.reconstruction.load import load_reconstruction
from fastmum.tasks.reconstruction.losses import ITERATION_DECAY, Prediction, Scene, unproject
from fastmum.tasks.reconstruction.model import Reconstruction
from fastmum.tasks.reconstruction.targets import TargetCache, Targets
from fastmum.tasks.reconstruction.task import ReconstructionTask
from fastmum.tasks.trained import weights_digest

log = logging.getLogger(__name__)


@dataclass
class DistillSection:
    """The teacher and its outputs."""

    teacher: str | None = key(None, "a run of reconstruction, or a file of VGGT's public checkpoint", is_path=True)
    image_size: int | None = key(
        None, "width of the teacher's frames in pixels. Empty: the student's, to the nearest multiple of its patch",
        least=1,
    )  # fmt: skip
    last_iteration: bool = key(False, "only the last refinement of the student's cameras learns; otherwise all")
    cache: str | None = key(None, "folder of the teacher's outputs, which are computed once. Empty: off", is_path=True)
    repeat_after: int | None = key(None, "steps after which the same frames come again, as a cache needs", least=1)


@dataclass
class DistillConfig(Config):
    """Everything that a run of distillation depends on."""

    model: ReconstructionSection = field(default_factory=lambda: ReconstructionSection(finetune=True))
    distill: DistillSection = field(default_factory=DistillSection)

    def check(self) -> None:
        super().check()
        if self.distill.teacher is None:
            raise ConfigError("distill.teacher is empty, but must be a run of reconstruction or VGGT's checkpoint")
        if self.distill.cache is not None and self.distill.repeat_after is None:
            raise ConfigError("distill.cache needs distill.repeat_after: otherwise no frames come twice")
        if self.loss != type(self.loss)():
            raise ConfigError("loss.* is set, but distillation adds up its errors without weights: remove it")


class DistillBatch(NamedTuple):
    """Frames, and the teacher's outputs if they were cached."""

    scene: SceneBatch
    targets: Targets | None


class Teacher:
    """A frozen model, with its own size of frames.

    Args:
        width: of its frames in pixels, a multiple of its patch size; None: the nearest one to that of the images.
    """

    def __init__(self, model: Reconstruction, width: int | None = None) -> None:
        self.model, self.width, self.patch = model, width, model.config.patch_size
        self._per_frame: dict[tuple[int, int], float] = {}
        if width is not None and width % self.patch:
            raise ConfigError(f"distill.image_size is {width}, but must be a multiple of the teacher's {self.patch}")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of its frames, the multiples of its patch size that are nearest to the aspect ratio."""
        wide = self.width or max(1, round(width / self.patch)) * self.patch
        return max(1, round(height * wide / width / self.patch)) * self.patch, wide

    def flops(self, height: int, width: int, lengths: Sequence[int]) -> float:
        """Operations for sequences of `lengths` frames of this size."""
        size, config, encoder = self.size(height, width), self.model.config, self.model.encoder
        assert encoder is not None
        grid = size[0] // self.patch, size[1] // self.patch
        if grid not in self._per_frame:
            self._per_frame[grid] = frame_flops(config, grid, encoder.config, finetune=True)
        return (self._per_frame[grid] * sum(lengths) + square_flops(config, grid, lengths)) / BACKWARD

    @torch.no_grad()
    def __call__(self, images: Tensor, lengths: Sequence[int], longest: int | None = None) -> Targets:
        """Outputs for frames (F, H, W, 3) uint8 of packed sequences, its maps resized bilinearly to H, W."""
        size, (H, W) = self.size(images.shape[1], images.shape[2]), images.shape[1:3]
        encoder = self.model.encoder
        assert encoder is not None
        if size != (H, W):
            pixels = images.permute(0, 3, 1, 2).float() / 255
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
            images = normalise(pixels, encoder.mean, encoder.std)
        found = self.model(images, lengths, longest)
        points = found.points
        maps = found.depth[:, None] if points is None else torch.cat([found.depth[:, None], points.movedim(-1, 1)], 1)
        if size != (H, W):
            maps = F.interpolate(maps, (H, W), mode="bilinear", align_corners=False)
        return Targets(found.cameras[-1], maps[:, 0], None if points is None else maps[:, 1:].movedim(1, -1))


def distill_losses(prediction: Prediction, targets: Targets, last_iteration: bool = False) -> dict[str, Tensor]:
    """`camera`, `depth`, `points` and `objective`, their sum; 0-d each.

    Mean L2 norm of the errors of cameras, depth and points. Every refinement of the student's cameras has the teacher's
    last one as target, weighted as in `camera_losses`; with `last_iteration` only the student's last one counts.
    """
    count = len(prediction.cameras)
    errors = torch.stack([(cameras - targets.cameras).norm(dim=-1).mean() for cameras in prediction.cameras])
    weights = [ITERATION_DECAY ** (count - 1 - i) / count for i in range(count)]
    camera = errors[-1] if last_iteration else (errors * errors.new_tensor(weights)).sum()
    losses = {"camera": camera, "depth": (prediction.depth - targets.depth).abs().mean()}
    if prediction.points is not None and targets.points is not None:
        losses["points"] = (prediction.points - targets.points).norm(dim=-1).mean()
    return losses | {"objective": torch.stack([*losses.values()]).sum()}


class DistillTask(ReconstructionTask):
    """Training on a teacher's outputs instead of the truth."""

    Config = DistillConfig
    config: DistillConfig  # type: ignore[assignment]
    ground_truth = False

    def __init__(self, config: DistillConfig, world: DistContext) -> None:
        super().__init__(config, world)
        self.metrics = {term: Metric() for term in ("camera", "depth", *(["points"] if config.model.points else []))}
        self._cache: TargetCache | None = None

    def build(self) -> Reconstruction:
        """Build the student, and load the teacher."""
        settings, points = self.config.distill, self.config.model.points
        model = load_reconstruction(str(settings.teacher))
        if points and model.point_head is None:
            raise ConfigError("model.points is true, but the teacher predicts no points: set it to false")
        if settings.cache is not None:
            about = {"teacher": weights_digest(model), "sizes": dataclasses.asdict(model.config), "points": points,
                     "width": settings.image_size, "precision": self.config.train.precision}  # fmt: skip
            self._cache = TargetCache(Path(settings.cache), about)
        self._teacher: Teacher | None = Teacher(model.to(self.world.device), settings.image_size)
        return super().build()

    def prepare(self) -> None:
        """Compute what the teacher predicts for held-out frames, and with a cache for those of training, too."""
        super().prepare()
        self._held_out = {i: DistillBatch(scene, self._ask(scene)) for i, scene in self._held_out.items()}
        if self._cache is None:
            return
        places = list(self.places(0, self._period))
        bar = progress_bar(total=len(places), desc="teacher", unit="batch", show=self.world.is_main and on_terminal())
        with bar:
            for batch in self._loader.batches((self._splits.training.plan(*p) for p in places), self.stopping):
                self._cached(batch)
                self.world.advance()
                bar.update()
        log.info("outputs of the teacher: %s", self._cache.summary())
        self._teacher = None  # its memory

    @property
    def _period(self) -> int:
        repeat, steps = self.config.distill.repeat_after, self.config.train.steps
        return steps if repeat is None else min(repeat, steps)

    def places(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return ((step % self._period, part) for step, part in super().places(start, stop))

    def _ask(self, batch: SceneBatch) -> Targets:
        """The teacher's outputs on the CPU."""
        assert self._teacher is not None
        device, longest = self.world.device, max(self.config.data.views[1], *batch.lengths)
        with autocast(device, self.config.train.precision):
            found = self._teacher(to_device(batch.images, device), batch.lengths, longest)
        return Targets(*(None if x is None else x.cpu() for x in found))  # type: ignore[arg-type]

    def _cached(self, batch: SceneBatch) -> Targets:
        assert self._cache is not None
        return self._cache.targets(batch.images, batch.lengths, lambda: self._ask(batch))

    def batches(self, start: int, stop: int) -> Iterator[DistillBatch]:
        for batch in super().batches(start, stop):
            yield DistillBatch(batch, None if self._cache is None else self._cached(batch))

    def loss(self, model: Reconstruction, batch: DistillBatch) -> StepOutput:  # type: ignore[override]
        """The mean over the micro-batches of the step."""
        return self.mean_of_batches(self._losses(self.predict(model, batch)))

    def predict(self, model: Reconstruction, batch: DistillBatch) -> tuple[Prediction, Targets]:  # type: ignore[override]
        """Outputs of the student and of the teacher."""
        scene, targets = batch
        longest = max(self.config.data.views[1], *scene.lengths)
        if targets is None:
            assert self._teacher is not None
            targets = self._teacher(scene.images, scene.lengths, longest)
        return model(scene.images, scene.lengths, longest), targets

    def _losses(self, found: tuple[Prediction, Targets]) -> dict[str, Tensor]:
        with torch.autocast(self.world.device.type, enabled=False):
            return distill_losses(*found, self.config.distill.last_iteration)

    @torch.no_grad()
    def evaluate(self, model: Reconstruction) -> dict[str, float]:
        """The loss over the held-out batches, sharded over the processes."""
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for i, batch in self._held_out.items():
            losses = self._losses(self.evaluated(model, batch))
            if i < self.config.train.eval_batches:
                total += torch.stack([losses["objective"].double(), total.new_ones(())])
        self.world.sum_(total)
        return {"held_out_loss": float(total[0] / total[1])}

    def draw(self, batch: DistillBatch, found: Any, title: str) -> dict[str, Image.Image]:  # type: ignore[override]
        """Those of reconstruction, with the teacher's outputs as the truth."""
        prediction, (cameras, depth, points) = found
        T, K = decode_cameras(cameras, (depth.shape[1], depth.shape[2]))
        points = unproject(depth, K, T) if points is None else points
        truth = Scene(T, K, depth, points, torch.ones_like(depth, dtype=torch.bool))
        return super().draw(batch.scene, (prediction, truth, None), f"{title}; true: the teacher")

    def sizes(self, batch: DistillBatch) -> tuple[int, float]:  # type: ignore[override]
        """With the teacher's forward pass if it computes."""
        frames, flops = super().sizes(batch.scene)
        if self._teacher is not None:
            height, width = batch.scene.images.shape[1:3]
            flops += self._teacher.flops(height, width, batch.scene.lengths)
        return frames, flops
