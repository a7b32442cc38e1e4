"""What can be set in a run: every key with its type, its default and its meaning."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from fastmum.attention import BACKENDS
from fastmum.model.config import PRESETS, ModelConfig

COMPILE_MODES = ("auto", "block", "full", "off")
RECOMPUTE_MODES = ("auto", "none", "mlp", "blocks")
STRATEGIES = ("ddp", "fsdp2", "hsdp")
PRECISIONS = ("bf16", "fp32", "fp8", "auto")
REDUCE_DTYPES = ("fp32", "bf16")
OPTIMIZERS = ("adamw", "apex")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


def _key(default: Any, meaning: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


@dataclass
class RunSection:
    """Where a run lies and what it draws from."""

    name: str = _key("mum", "name of the run")
    dir: str = _key("runs/${run.name}", "folder of everything the run writes")
    seed: int = _key(0, "of the weights, the sampling and the masks")


@dataclass
class ModelSection:
    """Sizes of the model and the mask."""

    preset: str = _key("mum_vitl16", f"sizes to begin with: {', '.join(PRESETS)}")
    embed_dim: int | None = _key(None, "encoder width; empty: the preset's")
    depth: int | None = _key(None, "encoder blocks; empty: the preset's")
    num_heads: int | None = _key(None, "encoder heads; empty: the preset's")
    decoder_embed_dim: int | None = _key(None, "decoder width; empty: the preset's")
    decoder_depth: int | None = _key(None, "decoder blocks, frame and global together; empty: the preset's")
    decoder_num_heads: int | None = _key(None, "decoder heads; empty: the preset's")
    patch_size: int | None = _key(None, "side of a patch in pixels; empty: the preset's")
    mask_ratio: float = _key(0.75, "share of masked patches in every frame")
    attention: str = _key("auto", f"backend of attention across frames: auto, {', '.join(BACKENDS)}")
    compile: str = _key("auto", f"torch.compile: {', '.join(COMPILE_MODES)}; block: each kind of block, full: all")
    recompute: str = _key(
        "auto",
        f"what is computed again in the backward pass, for less memory: {', '.join(RECOMPUTE_MODES)}; mlp: inside the "
        "MLPs, blocks: all inside of blocks; auto: mlp on CUDA, none on the CPU",
    )


@dataclass
class ScenesSection:
    """The embedded scenes, rendered where there are neither data.root nor data.manifests."""

    count: int = _key(20, "embedded scenes to render, those held out included")
    views: int = _key(24, "views of each")
    size: int = _key(256, "side of a rendered view in pixels")
    seed: int = _key(0, "of the scenes")


@dataclass
class DataSection:
    """What is trained on, and the sampling (supplement, "Sampling"; crops from the released code)."""

    manifests: list[str] = _key([], "files of sequences, built by python -m fastmum.data.build")
    weights: dict[str, float] = _key({}, "how often data sets are drawn, {co3d: 2}; 1 for those not named, 0 for never")
    root: str | None = _key(
        None, "folder; every sub-folder with images is a sequence. Without it and manifests: the embedded scenes"
    )
    image_root: str | None = _key(None, "folder of single images, at any depth")
    imagenet_share: float = _key(0.1, "share of single images (ImageNet-1K in the paper), where there are any")
    mode: str = _key(
        "packed", "paper: one number of views a batch; packed: full batches; balanced: and of equal cost on every GPU"
    )
    image_size: int = _key(256, "side of a training frame in pixels")
    views: list[int] = _key([2, 24], "fewest and most views of a sequence, drawn as often as the paper draws them")
    frames_per_batch: int = _key(96, "frames that a device computes at once; in the mode paper, at most")
    frames_per_step: int | None = _key(
        None, "frames of an optimiser step on all devices together, a multiple of frames_per_batch; what the devices "
        "cannot take at once they take in turn. Empty: one batch a device, or what a resumed run has had"
    )  # fmt: skip
    crop_scale: list[float] = _key([0.2, 1.0], "share of a frame's area that a random crop keeps")
    crop_aspect: list[float] = _key([0.75, 1.3333333], "aspect ratio of a random crop")
    flip: float = _key(0.5, "probability of a horizontal flip, drawn for each frame")
    held_out: float = _key(0.1, "share of sequences kept from training and evaluated on")
    decoder: str = _key("auto", "auto, dali (on the GPU), dali_cpu or pillow")
    workers: int = _key(2, "threads that decode images")
    cache_gb: float = _key(1.0, "memory for decoded images in GB, of pillow; saves decoding where a data set fits")
    scenes: ScenesSection = field(default_factory=ScenesSection)


@dataclass
class OptimSection:
    """AdamW and the learning rate (the paper's run)."""

    optimizer: str = _key("adamw", "adamw (fused), or apex: FusedAdam of NVIDIA Apex, installed from its source")
    base_lr: float = _key(1e-4, "peak learning rate for 256 frames; scaled linearly with the frames of a step")
    weight_decay: float = _key(0.05, "not applied to biases, norms and other 1-D parameters")
    betas: list[float] = _key([0.9, 0.95], "of AdamW")
    eps: float = _key(1e-8, "of AdamW")
    warmup_steps: int = _key(25_000, "linear warm-up; then half a cosine down to 0")


@dataclass
class TrainSection:
    """The loop: length, device, precision, intervals, resuming."""

    steps: int = _key(500_000, "optimiser steps of the whole run")
    device: str = _key("auto", "auto, cpu, cuda or cuda:N")
    precision: str = _key("bf16", "bf16 (autocast), fp32, fp8 (torchao, from sm_89 on), or auto: bf16 where it is fast")
    threads: int = _key(0, "CPU threads of torch; 0: its own choice")
    log_every: int = _key(50, "steps between lines of metrics.jsonl")
    checkpoint_every: int = _key(1000, "steps between checkpoints")
    keep_checkpoints: int = _key(3, "newest checkpoints to keep")
    keep_every: int = _key(0, "keep for good the checkpoints whose step is a multiple of this; 0: none")
    checkpoint_async: bool = _key(True, "write checkpoints in the background")
    max_bad_steps: int = _key(10, "steps in a row with a loss or gradient that is not finite, before the run stops")
    cuda_graphs: bool = _key(False, "record forward and backward of what is compiled, and replay them (CUDA)")
    collect_every: int = _key(1000, "steps between runs of Python's garbage collector, which is off otherwise")
    eval_every: int = _key(5000, "steps between evaluations on the held-out sequences")
    eval_batches: int = _key(8, "batches of an evaluation, the same every time")
    picture_every: int = _key(5000, "steps between reconstruction pictures")
    resume: str = _key(
        "auto",
        "auto: from the newest good checkpoint in run.dir, if there is one; latest: there must be one; "
        "never: set an old run aside; or a checkpoint, or a run whose newest to take",
    )


@dataclass
class ParallelSection:
    """Several devices: torchrun or SLURM starts a process for each."""

    strategy: str = _key(
        "ddp",
        "ddp: every device has all weights; fsdp2: a part of them; hsdp: a part within a group, copied over groups",
    )
    reduce: str = _key("fp32", "fp32 or bf16: what gradients are summed in over devices")
    shard: int = _key(0, "hsdp: devices that share one copy of the weights; 0: those of a machine")
    dead_after_s: float = _key(30.0, "seconds without a sign of life after which a process counts as dead")


@dataclass
class TelemetrySection:
    """Where metrics go, beside metrics.jsonl and TensorBoard."""

    wandb: str | None = _key(None, "project in Weights & Biases; empty: not used")


@dataclass
class ProfileSection:
    """Looking at a few steps closely."""

    steps: str | None = _key(None, "steps to profile, such as 10-15; a trace and a table in run.dir/profile")

    @property
    def window(self) -> range:
        """The steps, counted from 1; none: empty.

        Raises:
            ConfigError: not of the form 10-15 or 12.
        """
        if self.steps is None:
            return range(0)
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.steps)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last:
            raise ConfigError(f"profile.steps is '{self.steps}', but must be steps such as 10-15, the first at least 1")
        return range(first, last + 1)


@dataclass
class Config:
    """Everything that a run depends on, in sections."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    telemetry: TelemetrySection = field(default_factory=TelemetrySection)
    profile: ProfileSection = field(default_factory=ProfileSection)

    @property
    def model_config(self) -> ModelConfig:
        """The preset with the sizes that the run overrides.

        Raises:
            ConfigError: an unknown preset or sizes that do not fit.
        """
        if self.model.preset not in PRESETS:
            raise ConfigError(f"model.preset is '{self.model.preset}', but must be one of {', '.join(PRESETS)}")
        names = {f.name for f in dataclasses.fields(ModelConfig)}
        given = {k: v for k, v in dataclasses.asdict(self.model).items() if k in names and v is not None}
        try:
            return dataclasses.replace(PRESETS[self.model.preset], **given)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from None

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, loadable as a configuration file."""
        return OmegaConf.to_yaml(OmegaConf.structured(self), resolve=True)
