"""MuM's pretraining: masked reconstruction of the views of a scene (paper, section 3; supplement, "Sampling")."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fastmum.attention import AttentionError, Segments, choose_backend
from fastmum.attention.backend import ragged_lengths
from fastmum.config.mum import Config as MuMConfig
from fastmum.config.schema import ConfigError
from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import whole_frames
from fastmum.data.loader import Loader
from fastmum.data.plan import StepPlan
from fastmum.data.splits import DataSplits, open_splits
from fastmum.engine.device import MATRIX_DTYPE, to_device
from fastmum.engine.distributed import DistContext
from fastmum.engine.fp8 import check_fp8, use_fp8
from fastmum.engine.task import Metric, Samples, StepOutput
from fastmum.kernels import gather_patches
from fastmum.model.compile import blocks_of, compile_model, eager
from fastmum.model.config import step_flops
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD, num_visible, seeded_noise
from fastmum.model.mum import MuM, MuMOutput
from fastmum.model.products import choose_products
from fastmum.tasks.loader_task import LoaderTask

log = logging.getLogger(__name__)

MOST_VIEWS = 256  # longer sequences are counted as this
EVAL_SEED = 0  # of the masks; not the run's, so that runs with different seeds can be compared
PICTURE_SEQUENCES = 3
PICTURE_VIEWS = 6
ROWS = "original", "visible", "predicted"  # of the picture, for each sequence
GREY = 118  # of masked patches, out of 255
ZOOM = 2  # pixels of the picture for each pixel of a frame
GAP, TEXT = 8, 14  # pixels: between frames, least size of text
LEGIBLE = 120  # sides of large pictures are this many times the size of their text


class MuMBatch(NamedTuple):
    """A micro-batch of packed sequences."""

    frames: Tensor  # (F, size, size, 3) uint8
    lengths: tuple[int, ...]  # frames of every sequence
    noise: Tensor  # (F, P) float32, for the masks
    views: Tensor  # (F,) int64, length of the sequence that each frame belongs to
    step_frames: int  # frames of the step over all processes


class MuMTask(LoaderTask):
    """Masked reconstruction.

    A step is planned in micro-batches of `data.frames_per_batch` frames, whatever the number of processes: each takes
    as many consecutive ones as it must. So a step has the same frames, in the same micro-batches, on any number of
    processes that divides theirs.
    """

    Config = MuMConfig
    metrics: Mapping[str, Metric] = {"loss": Metric(MOST_VIEWS + 1, "views")}
    config: MuMConfig

    def __init__(self, config: MuMConfig, world: DistContext) -> None:
        super().__init__(config, world)
        data, model = config.data, config.model_config
        self.samples = Samples(
            data.frames_per_batch, data.frames_per_step, "frames", ("data.frames_per_batch", "data.frames_per_step")
        )
        self._patches = (data.image_size // model.patch_size) ** 2
        visible = self._visible = num_visible(self._patches, config.model.mask_ratio)
        # FLOPs are a F + b sum(S^2): two counts give both factors.
        one, two = (step_flops(model, self._patches, visible, [S]).total for S in (1, 2))
        self._flops_per_square = (two - 2 * one) // 2
        self._flops_per_frame = one - self._flops_per_square
        self._view_numbers = torch.arange(MOST_VIEWS + 1, device=world.device)
        self._splits: DataSplits
        self._loader: Loader
        self._held_out: dict[int, MuMBatch] = {}
        self._shown: MuMBatch
        self._shown_names: tuple[list[str], list[str]]

    def build(self) -> MuM:
        """The model; ConfigError if `model.attention` or `train.precision` is not available on the device."""
        config, device = self.config, self.world.device
        dtype = MATRIX_DTYPE[config.train.precision]
        try:
            backend = choose_backend(config.model.attention, device, dtype)
        except AttentionError as error:
            raise ConfigError(f"model.attention: {error}") from None
        heads, frames = config.model_config.decoder_num_heads, config.data.frames_per_batch
        width, tokens, longest = config.model_config.decoder_embed_dim // heads, 1 + self._patches, config.data.views[1]
        batch = Segments.of_frames(ragged_lengths(frames, longest), frames, tokens, tokens, longest)
        log.info("global attention: %s", backend.prepare(device, dtype, heads, width, batch))
        if config.train.precision == "fp8":
            check_fp8(device)
        model = MuM(config.model_config).to(device)
        model.attention, model.norm_pix = backend.name, config.loss.norm_pix
        recompute = config.model.recompute
        if recompute == "auto":
            recompute = "mlp" if device.type == "cuda" else "none"
        model.set_recompute(recompute)
        if config.train.precision == "bf16":
            choose_products(config.model_config, frames, self._patches, self._visible, recompute, device, dtype)
        if config.train.precision == "fp8":
            log.info("float8 products in %d linear layers", use_fp8(model, blocks_of(model)))
        return model

    def blocks(self, model: MuM) -> list[nn.Module]:
        return [*blocks_of(model)]

    def manifest(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config.model_config)

    def compile(self, model: MuM, steps: int) -> None:
        """Compile as `model.compile` says; ConfigError if `train.cuda_graphs` cannot be used."""
        mode, graphs = self.config.model.compile, self.config.train.cuda_graphs
        try:
            compile_model(model, mode, steps, several_devices=self.world.size > 1, cuda_graphs=graphs)
        except ValueError as error:
            raise ConfigError(f"train.cuda_graphs is true, but {error}") from None

    def open_data(self, folder: Path, start: int, samples_per_step: int) -> None:
        """Open manifests, planners and decoder; DataError if the data cannot be used."""
        data = self.config.data
        micro_batches = samples_per_step // data.frames_per_batch
        # Other processes open the manifests that the first one has written.
        self._splits = open_splits(self.config, folder, start > 0 or not self.world.is_main, micro_batches)
        decoder = make_decoder(data.decoder, data.image_size, self.world.device, int(data.cache_gb * 1e9))
        splits, bad_frames = self._splits, folder / "bad_frames.log"
        self._loader = Loader(
            decoder, splits.manifests, data.workers, bad_frames, splits.is_held_out, self.world.size, data.retry_s
        )

    def prepare(self) -> None:
        """Decode the held-out batches of this process and the frames of the picture."""
        picture, plans = _picture_plan(self._splits, self.config.data.frames_per_batch), self.held_out_plans()
        shown, *evaluated = self._loader.batches([picture, *plans.values()], self.stopping)
        for i, (frames, lengths) in zip(plans, evaluated, strict=True):
            mask = min(i, self.config.train.eval_batches - 1)
            self._held_out[i] = self._batch(frames, lengths, EVAL_SEED, mask)
        self._shown = self._batch(*shown, EVAL_SEED, 0)
        self._shown_names = _picture_names(self._splits, picture)

    def batches(self, start: int, stop: int) -> Iterator[MuMBatch]:
        planner = self._splits.training
        for (step, part), (frames, lengths) in zip(self.places(start, stop), super().batches(start, stop), strict=True):
            yield self._batch(frames, lengths, self.config.run.seed, step, part, planner.step_frames(step))

    def _batch(
        self, frames: Tensor, lengths: tuple[int, ...], seed: int, step: int, part: int = 0, step_frames: int = 0
    ) -> MuMBatch:
        noise = seeded_noise(seed, part, step, len(frames), self._patches)
        views = torch.tensor(lengths)
        return MuMBatch(frames, lengths, noise, views.repeat_interleave(views), step_frames or len(frames))

    def forward(self, model: MuM, batch: MuMBatch) -> MuMOutput:
        """The model's output with the loss of every frame."""
        # The same for all training batches; pictures may show more views.
        max_views = max(self.config.data.views[1], *batch.lengths)
        mask_ratio = self.config.model.mask_ratio
        return model(batch.frames, batch.lengths, mask_ratio, batch.noise, max_views, reduction="none")

    def loss(self, model: MuM, batch: MuMBatch) -> StepOutput:
        """Mean over the masked patches of all frames of the step: every frame has as many of them."""
        losses = self.forward(model, batch).loss
        # A product adds in the same order every time; index_add on CUDA does not.
        which = (batch.views.clamp(max=MOST_VIEWS)[:, None] == self._view_numbers).double()
        sums, counts = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)]) @ which
        return StepOutput(losses.sum(), float(len(losses)), float(batch.step_frames), {"loss": (sums, counts)})

    def sizes(self, batch: MuMBatch) -> tuple[int, float]:
        frames, squares = sum(batch.lengths), sum(S * S for S in batch.lengths)
        return frames, float(self._flops_per_frame * frames + self._flops_per_square * squares)

    def tokens(self, samples: int) -> float:
        return samples * self._patches

    @torch.no_grad()
    def evaluate(self, model: MuM) -> dict[str, float]:
        """Masked loss over held-out frames: the same batches and masks every time, sharded over the processes."""
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for i, batch in self._held_out.items():
            losses = self._evaluated(model, batch).loss.double()
            if i < self.config.train.eval_batches:
                total += torch.stack([losses.sum(), torch.ones_like(losses).sum()])
        self.world.sum_(total)
        loss, frames = total.tolist()
        return {"held_out_loss": loss / frames}

    @torch.no_grad()
    def pictures(self, model: MuM, step: int) -> dict[str, Image.Image]:
        """Originals, masked frames and predictions of a few sequences."""
        batch = self._shown
        output = self._evaluated(model, batch)
        frames, masked_ids, pred = batch.frames.cpu(), output.masked_ids.cpu(), output.pred.float().cpu()
        norm_pix, losses = self.config.loss.norm_pix, output.loss.tolist()
        named = step, *self._shown_names, losses
        return {"reconstruction": draw_reconstruction(frames, batch.lengths, masked_ids, pred, *named, norm_pix)}

    def describe_steps(self, steps: range) -> str:
        """Share of frames of each data set in these steps, over all processes."""
        manifests, planner = self._splits.manifests, self._splits.training
        counts = np.zeros(len(manifests.datasets), np.int64)
        for step in steps:
            for part in range(planner.world_size):
                sets = manifests.dataset_of[manifests.sequence_of(planner.plan(step, part).rows)]
                counts += np.bincount(sets, minlength=len(counts))
        shares = zip(manifests.datasets, counts / counts.sum(), strict=True)
        return "their frames are from " + ", ".join(f"{name} {share:.0%}" for name, share in shares if share)

    def summary(self, values: Mapping[str, float | None]) -> str:
        loss, held_out = values["loss"], values.get("held_out_loss")
        return (
            f"loss {'none' if loss is None else f'{loss:.3f}'}"
            + (f", held-out loss {held_out:.3f}" if held_out is not None else "")
            + (" (predicting each patch's mean scores 1.0)" if self.config.loss.norm_pix else "")
        )

    def _evaluated(self, model: MuM, batch: MuMBatch) -> MuMOutput:
        with eager(model):
            return self.forward(model, to_device(batch, self.world.device))


def _picture_plan(splits: DataSplits, max_frames: int) -> StepPlan:
    """A few neighbouring views of a few sequences, uncropped."""
    shown, starts = splits.shown, splits.manifests.starts
    which = np.linspace(0, len(shown) - 1, min(PICTURE_SEQUENCES, len(shown))).round().astype(int)
    views = max(1, min(PICTURE_VIEWS, max_frames // len(which)))
    picked = []
    for first, end in zip(starts[shown[which]].tolist(), starts[shown[which] + 1].tolist(), strict=True):
        stride = max(1, (end - first) // (2 * views))
        picked.append(np.arange(first, end)[: views * stride : stride])
    rows, lengths = np.concatenate(picked), np.array([len(rows) for rows in picked])
    return StepPlan(rows, lengths, whole_frames(len(rows)), np.zeros(len(rows), bool))


def _picture_names(splits: DataSplits, plan: StepPlan) -> tuple[list[str], list[str]]:
    """Names of the sequences, with their data sets, and of the frames."""
    manifests, firsts = splits.manifests, plan.rows[np.cumsum([0, *plan.lengths[:-1]])]
    numbers = manifests.sequence_of(firsts).tolist()
    sequences = [f"{manifests.datasets[manifests.dataset_of[i]]}/{manifests.sequence_name(i)}" for i in numbers]
    return sequences, [file.stem for file in manifests.files(plan.rows)]


def draw_reconstruction(
    frames: Tensor, lengths: Sequence[int], masked_ids: Tensor, pred: Tensor, step: int, sequences: Sequence[str],
    names: Sequence[str], losses: Sequence[float], norm_pix: bool = True,
) -> Image.Image:  # fmt: skip
    """Draw three rows for each sequence (original, masked, predicted), one column a view, `ZOOM` times as large.

    Args:
        frames: (F, H, W, 3) uint8, packed sequences of `lengths` frames.
        masked_ids, pred: (F, M) and (F, M, 3*p*p) float32 of `MuMOutput`; all on the CPU.
        step, sequences, names, losses: for the labels; a name for each sequence, a name and a loss for each frame.
        norm_pix: whether the loss normalised its targets.
    """
    stacks = [stack.split(tuple(lengths)) for stack in (frames, *reconstructions(frames, masked_ids, pred, norm_pix))]
    height, width = ZOOM * frames.shape[1] + GAP, ZOOM * frames.shape[2] + GAP
    size = max(TEXT, max(max(lengths) * width, 3 * len(lengths) * height) // LEGIBLE)
    line, margin = 10 * size // 7, 6 * size
    block = 2 * line + 3 * height + GAP
    page = Image.new("RGB", (margin + max(lengths) * width, line + len(lengths) * block), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=size)

    def write(x: int, y: int, room: int, text: str, end: str = "") -> None:
        """Write a text and an `end`; the start of a text that is wider than the room in pixels is left out."""
        text, cut = text.encode(errors="replace").decode(), 0
        while cut < len(text) and draw.textlength(f"{'…' * (cut > 0)}{text[cut:]}{end}", font) > room:
            cut += 1
        draw.text((x, y), f"{'…' * (cut > 0)}{text[cut:]}{end}", "black", font)

    write(GAP, 2, page.width, f"step {step:,}, masked loss {sum(losses) / len(losses):.3f}")
    first = 0
    for i, sequence in enumerate(zip(*stacks, strict=True)):
        top, count = line + i * block, lengths[i]
        own = losses[first : first + count]
        write(margin, top, page.width - margin, sequences[i], f": loss {sum(own) / count:.3f}")
        for column, (name, loss) in enumerate(zip(names[first : first + count], own, strict=True)):
            write(margin + column * width, top + line, width - GAP, name, f": {loss:.3f}")
        for row, (label, views) in enumerate(zip(ROWS, sequence, strict=True)):
            write(GAP, top + 2 * line + row * height, margin, label)
            for column, view in enumerate(views):
                large = Image.fromarray(view.repeat_interleave(ZOOM, 0).repeat_interleave(ZOOM, 1).numpy())
                page.paste(large, (margin + column * width, top + 2 * line + row * height))
        first += count
    return page


def reconstructions(frames: Tensor, masked_ids: Tensor, pred: Tensor, norm_pix: bool = True) -> tuple[Tensor, Tensor]:
    """Frames with their masked patches in grey, and as predicted, (F, H, W, 3) uint8 each; arguments as above.

    With `norm_pix` the model predicts patches without mean and contrast; the picture takes both from the original.
    """
    side = int((pred.shape[-1] // 3) ** 0.5)
    if norm_pix:
        original = gather_patches(frames, masked_ids, IMAGENET_MEAN, IMAGENET_STD, side, torch.float32)
        var, mean = torch.var_mean(original, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    pixels = (pred.unflatten(-1, (side, side, 3)) * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)) * 255
    patches = pixels.round().clamp(0, 255).to(torch.uint8)
    return _put(frames, masked_ids, torch.full_like(patches, GREY)), _put(frames, masked_ids, patches)


def _put(frames: Tensor, ids: Tensor, patches: Tensor) -> Tensor:
    """A copy of the frames (F, H, W, 3) with the patches (F, M, p, p, 3) at `ids` (F, M)."""
    F, H, W, C = frames.shape
    p = patches.shape[2]
    grid = frames.clone().view(F, H // p, p, W // p, p, C)
    frame = torch.arange(F)[:, None]
    grid[frame, ids // (W // p), :, ids % (W // p)] = patches
    return grid.view(F, H, W, C)
