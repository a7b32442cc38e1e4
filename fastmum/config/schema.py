"""Configuration keys: type, default, bounds and meaning in one place. The sections that every task shares."""

import operator
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from omegaconf import OmegaConf

from fastmum.errors import FastmumError

# Name of a bound: its words in a message, and the comparison.
LIMITS = {
    "least": ("at least", operator.ge), "above": ("greater than", operator.gt),
    "most": ("at most", operator.le), "below": ("less than", operator.lt),
}  # fmt: skip


RESUME_WORDS = ("auto", "latest", "never")
S = TypeVar("S")


class ConfigError(FastmumError, ValueError):
    """A configuration that cannot be used."""


def problem(value: Any, choices: tuple[str, ...] = (), length: int | None = None, **limits: float) -> str | None:
    """What a value must be, or None if it is allowed; `limits` (see `LIMITS`) hold for every number of a list."""
    if choices and value not in choices:
        return f"one of {', '.join(choices)}"
    if length is not None and len(value) != length:
        return f"a list of {length} numbers"
    for number in value if isinstance(value, list) else [value]:
        for name, limit in limits.items():
            words, fits = LIMITS[name]
            if number is not None and not isinstance(number, str) and not fits(number, limit):
                return f"{words} {limit:g}"
    return None


def key(default: Any, meaning: str, is_path: bool | str = False, **bounds: Any) -> Any:
    """A configuration key; `bounds` are the arguments of `problem`. `is_path` "weights": a path, or KIND:PATH."""
    given: dict = {"default_factory": default.copy} if isinstance(default, list | dict) else {"default": default}
    return field(**given, metadata={"meaning": meaning, "is_path": is_path, "bounds": bounds})


@dataclass
class RunSection:
    """Identity of a run."""

    name: str = key("mum", "name of the run")
    task: str = key("mum", "what is trained: mum, or another name in fastmum/tasks")
    dir: str = key("runs/${run.name}", "folder of everything that the run writes", is_path=True)
    seed: int = key(0, "random seed of weights, sampling and masks", least=0)


@dataclass
class OptimSection:
    """Optimizer and learning-rate schedule (the paper's run by default)."""

    optimizer: str = key(
        "adamw", "adamw (fused), muon, or apex (NVIDIA's AdamW, from source)", choices=("adamw", "muon", "apex")
    )
    base_lr: float = key(1e-4, "peak learning rate for lr_frames frames per step, scaled linearly with them", above=0)
    lr_frames: int = key(256, "frames per step that base_lr is for; 0: any number, rates are not scaled", least=0)
    weight_decay: float = key(0.05, "not applied to biases, norms and other 1-D parameters", least=0)
    betas: list[float] = key([0.9, 0.95], "AdamW's betas", least=0, below=1, length=2)
    eps: float = key(1e-8, "AdamW's epsilon", above=0)
    muon_lr_scale: float = key(1.0, "muon: factor of the learning rate for the blocks' matrices", above=0)
    orthogonalize: str = key(
        "newton_schulz", "muon: newton_schulz (five steps) or polar_express", choices=("newton_schulz", "polar_express")
    )
    clip: float | None = key(None, "largest norm of the gradient; larger ones are scaled down. Empty: off", above=0)
    schedule: str = key(
        "cosine", "cosine, step (at milestones) or wsd (constant, then linear)", choices=("cosine", "step", "wsd")
    )
    warmup_steps: int = key(25_000, "steps of linear warm-up", least=0)
    warmup_lr: float = key(0.0, "learning rate before the first step of the warm-up, scaled like base_lr", least=0)
    min_lr: float = key(0.0, "cosine, wsd: learning rate at the end, scaled like base_lr", least=0)
    milestones: list[int] = key([], "step: steps at which the learning rate is multiplied by gamma", least=1)
    gamma: float = key(0.1, "step: factor at each milestone", above=0)
    decay_share: float = key(0.2, "wsd: share of all steps, the last ones, in which the rate decays", least=0, most=1)


@dataclass
class TrainSection:
    """The loop: length, device, precision, intervals, resuming."""

    steps: int = key(500_000, "optimizer steps of the whole run", least=1)
    device: str = key("auto", "auto, cpu, cuda or cuda:N")
    precision: str = key(
        "bf16", "bf16 (autocast), fp32, fp8 (torchao), auto: bf16 where fast", choices=("bf16", "fp32", "fp8", "auto")
    )
    ema: float | None = key(None, "decay of the moving average of weights, 0.999 or so. Empty: off", above=0, below=1)
    threads: int = key(0, "CPU threads of torch; 0: torch's default", least=0)
    log_every: int = key(50, "steps between lines of metrics.jsonl", least=1)
    checkpoint_every: int = key(1000, "steps between checkpoints", least=1)
    keep_checkpoints: int = key(3, "number of newest checkpoints to keep", least=1)
    keep_every: int = key(0, "keep checkpoints at multiples of this step for good; 0: none", least=0)
    checkpoint_async: bool = key(True, "write checkpoints in the background")
    max_bad_steps: int = key(10, "consecutive steps with non-finite loss or gradient before the run stops", least=1)
    cuda_graphs: bool = key(False, "record the compiled forward and backward as CUDA graphs")
    deterministic: bool = key(
        False, "make CUDA runs repeat bit for bit, or end with an error; slower attention (CPU runs repeat anyway)"
    )
    collect_every: int = key(1000, "steps between runs of Python's garbage collector, which is off otherwise", least=1)
    eval_every: int = key(5000, "steps between evaluations on held-out data", least=1)
    eval_batches: int = key(8, "batches of an evaluation, the same every time", least=1)
    eval_first: bool = key(False, "evaluate before the first step, too")
    picture_every: int = key(5000, "steps between pictures", least=1)
    resume: str = key(
        "auto", "auto: from the newest good checkpoint in run.dir, if there is one; latest: there must be one; "
        "never: set an old run aside; or the path of a checkpoint or of a run", is_path=True
    )  # fmt: skip


@dataclass
class ParallelSection:
    """Several devices: torchrun or SLURM starts one process per device."""

    strategy: str = key(
        "ddp", "weights: ddp: replicated; fsdp2: sharded; hsdp: sharded in groups", choices=("ddp", "fsdp2", "hsdp")
    )
    reduce: str = key("fp32", "dtype of the reduction of gradients: fp32 or bf16", choices=("fp32", "bf16"))
    shard: int = key(0, "hsdp: devices that share one copy of the weights; 0: those of a machine", least=0)
    dead_after_s: float = key(30.0, "seconds without a heartbeat after which a process counts as dead", least=1)
    stuck_after_s: float = key(
        1800.0, "seconds without progress (a batch, a reduction, a barrier, a step of a progress bar while data are "
        "opened) after which a process counts as stuck; must be longer than compilation, an evaluation, or writing a "
        "checkpoint", least=1,
    )  # fmt: skip


@dataclass
class TelemetrySection:
    """Sinks for metrics in addition to metrics.jsonl and TensorBoard."""

    wandb: str | None = key(None, "project in Weights & Biases. Empty: off")


@dataclass
class ProfileSection:
    """Profiling a few steps."""

    steps: str | None = key(None, "steps to profile, such as 10-15; a trace and a table go to run.dir/profile")

    @property
    def window(self) -> range:
        """The steps to profile, counted from 1; empty if there are none. ConfigError: not of the form 10-15 or 12."""
        if self.steps is None:
            return range(0)
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.steps)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last:
            raise ConfigError(f"profile.steps is '{self.steps}', but must be steps such as 10-15, the first at least 1")
        return range(first, last + 1)


@dataclass
class EngineConfig:
    """The sections that every task has. A task adds its own in a subclass."""

    run: RunSection = field(default_factory=RunSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    telemetry: TelemetrySection = field(default_factory=TelemetrySection)
    profile: ProfileSection = field(default_factory=ProfileSection)

    def check(self) -> None:
        """Raise ConfigError for the first broken rule that involves more than one key; subclasses extend it."""
        _ = self.profile.window

    def notes(self) -> list[str]:
        """Settings that are allowed, but mean nothing in a run of `train.steps`, a line each."""
        steps, optim = self.train.steps, self.optim
        notes = []
        if optim.warmup_steps >= steps:
            notes.append(f"optim.warmup_steps is {optim.warmup_steps}: the learning rate never reaches its peak")
        if optim.schedule == "step" and (late := [step for step in optim.milestones if step >= steps]):
            notes.append(f"optim.milestones has {late}, which are never reached")
        if self.profile.window and self.profile.window[-1] > steps:
            notes.append(f"profile.steps is {self.profile.steps}: not all of these steps are reached")
        return [f"{note} (train.steps is {steps})" for note in notes]

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, which `load_config` reads again."""
        return OmegaConf.to_yaml(OmegaConf.structured(self), resolve=True)


def absolute_paths(section: S, absolute_weights: Callable[[str], str]) -> S:
    """A copy of a configuration, or of a section, whose paths mean the same in every working directory.

    `absolute_weights` is for the keys of weights, which are paths, KIND:PATH or names.
    """

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(path) for path in value]
        if isinstance(value, dict):
            return {name: absolute(path) for name, path in value.items()}
        if value is None or value in RESUME_WORDS or "://" in value:  # the URL of a store
            return value
        return os.path.abspath(os.path.expanduser(value))

    changes: dict[str, Any] = {}
    for entry in fields(section):  # type: ignore[arg-type]
        value = getattr(section, entry.name)
        if is_dataclass(value):
            changes[entry.name] = absolute_paths(value, absolute_weights)
        elif by := entry.metadata.get("is_path"):
            changes[entry.name] = absolute_weights(value) if by == "weights" and value else absolute(value)
    return replace(section, **changes)  # type: ignore[type-var]
