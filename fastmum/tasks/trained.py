"""The encoder that a downstream task is built on, and trained runs of such tasks."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fastmum.config.schema import ConfigError, EngineConfig, key
from fastmum.engine.checkpoint import CheckpointError, read_weights
from fastmum.engine.checkpoint.manifest import CheckpointManifest
from fastmum.errors import FastmumError
from fastmum.files import expand_user
from fastmum.model.encoder import Encoder
from fastmum.pretrained.layout import WeightsError
from fastmum.pretrained.load import RANDOM, load_encoder, split_spec

log = logging.getLogger(__name__)

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)
S = TypeVar("S")


class LayoutError(FastmumError):
    """A state dict that is not in the layout of the model."""


@dataclass
class EncoderSection:
    """The encoder of a downstream task; its section `model` derives from it."""

    encoder: str = key(
        "random:mum_vitl16",
        "weights of the encoder: a run, an export, a file, dinov3:PATH, random:PRESET",
        is_path="weights",
    )
    fallback: str | None = key(
        None,
        "weights if there is no file or folder at the path `encoder`, said in a warning. Empty: an error",
        is_path="weights",
    )

    patch_size: int | None = key(
        None, "side of the encoder's patches, which are resampled if it is another. Empty: that of the weights", least=1
    )  # fmt: skip

    def sizes_of(self, kind: type[C], encoder_dim: int, patch_size: int, **more: Any) -> C:
        """Sizes of a model, the dataclass `kind`, from the keys of this section; ConfigError if they do not fit."""
        names = {f.name for f in fields(kind)} & vars(self).keys() - {"patch_size", *more}  # type: ignore[arg-type]
        given: dict[str, Any] = {name: tuple(v) if isinstance(v := getattr(self, name), list) else v for name in names}
        try:
            return kind(encoder_dim=encoder_dim, patch_size=patch_size, **given, **more)  # type: ignore[call-arg]
        except ValueError as error:
            raise ConfigError(f"model.{error}") from None


@dataclass
class EncoderConfig(EngineConfig):
    """The configuration of a downstream task, whose subclass has the sections of its model and of its data."""

    model: Any = None
    data: Any = None

    def check(self) -> None:
        """Check rules between keys; those about the patch size are checked when the encoder is loaded."""
        super().check()
        self.model.sizes(1, 1)
        self.data.check(1)


class Trained(NamedTuple, Generic[M]):
    """A trained run."""

    model: M  # frozen, in eval mode
    name: str  # of the run, for tables
    step: int
    frames: int | None  # seen in training, if known
    image_size: int  # width of the training images in pixels
    encoder: Mapping[str, Any]  # `Encoder.about`

    @classmethod
    def of(
        cls, model: M, manifest: CheckpointManifest, image_size: int, device: torch.device | str, frames: int = 1
    ) -> "Trained[M]":
        """A model whose weights are those of a checkpoint; `image_size` if it has none, `frames` of a sample."""
        samples = manifest.values.get("samples_per_step")
        run = manifest.path.parent.parent if manifest.path.parent.name == "checkpoints" else manifest.path
        return cls(
            model.to(device).eval().requires_grad_(False), run.name, manifest.step,
            None if samples is None else frames * samples * manifest.step,
            manifest.values["config"].get("data.image_size", image_size), cast(Encoder, model.encoder).about,
        )  # fmt: skip


def choose_encoder(settings: Any) -> str:
    """`encoder` of a section `model`, or `fallback` if there is nothing at its path."""
    kind, where = split_spec(settings.encoder)
    if settings.fallback is None or kind in (RANDOM, "timm") or expand_user(where).exists():
        return settings.encoder
    log.warning("model.encoder: there is nothing at '%s': the encoder is %s (fallback)", where, settings.fallback)
    return settings.fallback


def task_encoder(settings: Any, spec: str) -> Encoder:
    """The encoder `spec` as a section `model` asks for it."""
    patches = {} if settings.patch_size is None else {"patch_size": settings.patch_size}
    return load_encoder(spec, trainable=settings.finetune, **patches)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights and their names, `frozen_encoder` in checkpoints."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_settings(
    path: Path, tasks: Sequence[str], section: type[S]
) -> tuple[CheckpointManifest, dict[str, Tensor], S]:  # fmt: skip
    """Manifest, weights and the section `model` of the configuration of a run, a folder of checkpoints or a checkpoint.

    Moving averages are used if there are any. CheckpointError: no such run, or one of another task than `tasks`.
    """
    manifest, tensors = read_weights(path)
    if (task := manifest.values.get("task", "mum")) not in tasks:
        raise CheckpointError(f"'{path}' is a run of the task '{task}', but one of {tasks[0]} is needed")
    if any(name.startswith("ema.") for name in manifest.tensors):
        tensors |= read_weights(manifest.path, prefix="ema.").tensors
    config = manifest.values["config"]
    known = {f.name: f"model.{f.name}" for f in fields(section)}  # type: ignore[arg-type]
    return manifest, tensors, section(**{name: config[key] for name, key in known.items() if key in config})


def load_trained(
    path: str | os.PathLike[str], task: str, section: type[S], make: Callable[[S, Encoder], M], image_size: int,
    device: torch.device | str = "cpu", encoder: str | None = None,
) -> Trained[M]:  # fmt: skip
    """Load a run of pairs, a folder of checkpoints or a checkpoint; EMA weights if it has them.

    WeightsError, CheckpointError or LayoutError: no such run, one of another task, or another encoder than the run's.

    Args:
        section: the section `model` of the task's configuration, of which, and of an encoder, `make` makes a model.
        image_size: of runs that do not say it.
        encoder: spec of the encoder, if its files were moved. A finetuned one has the weights of the run.
    """
    path = expand_user(path)
    manifest, tensors, settings = read_settings(path, (task,), section)
    model = fill(make(settings, read_encoder(path, manifest, settings, encoder)), tensors, manifest.path)
    return Trained.of(model, manifest, image_size, device, frames=2)


def read_encoder(path: Path, manifest: CheckpointManifest, settings: Any, encoder: str | None = None) -> Encoder:
    """The encoder of a run, of which checkpoints have no frozen weights; of a finetuned one only the architecture.

    `encoder` is its spec, if its files were moved. WeightsError: it cannot be loaded, or is another one than the run's.
    """
    spec = encoder or choose_encoder(settings)
    try:
        loaded = task_encoder(settings, spec)
    except FastmumError as error:
        raise WeightsError(f"the encoder '{spec}' of the run '{path}' cannot be loaded: {error}") from None
    if not settings.finetune and weights_digest(loaded) != manifest.values["model_config"].get("frozen_encoder"):
        raise WeightsError(f"the encoder '{spec}' has other weights than the one that '{path}' was trained on")
    return loaded


def fill(model: M, state: Mapping[str, Tensor], path: Path) -> M:
    """Load weights from `path` into a model, whose encoder and buffers may stay; LayoutError: they do not fit."""
    own = {name for name, _ in model.named_buffers()}
    kept = {name: x for name, x in model.state_dict().items() if name.startswith("encoder.") or name in own}
    try:
        model.load_state_dict(kept | dict(state))
    except RuntimeError as error:
        raise LayoutError(f"'{path}' does not fit the model: {' '.join(str(error).split())}") from None
    return model
