"""Configuration of MuM's pretraining: the engine's sections, and those of model, data and loss."""

import dataclasses
from dataclasses import dataclass, field

from fastmum.attention import BACKENDS
from fastmum.config.schema import ConfigError, EngineConfig, key
from fastmum.config.sources import SourceSection
from fastmum.model.config import COMPILE_MODES, PRESETS, ModelConfig
from fastmum.model.inputs import num_visible


@dataclass
class ModelSection:
    """Sizes of the model, mask and attention."""

    preset: str = key("mum_vitl16", f"sizes to start from: {', '.join(PRESETS)}", choices=tuple(PRESETS))
    embed_dim: int | None = key(None, "encoder width. Empty: the preset's")
    depth: int | None = key(None, "encoder blocks. Empty: the preset's")
    num_heads: int | None = key(None, "encoder heads. Empty: the preset's")
    decoder_embed_dim: int | None = key(None, "decoder width. Empty: the preset's")
    decoder_depth: int | None = key(None, "decoder blocks, frame and global together. Empty: the preset's")
    decoder_num_heads: int | None = key(None, "decoder heads. Empty: the preset's")
    patch_size: int | None = key(None, "side of a patch in pixels. Empty: the preset's")
    mask_ratio: float = key(0.75, "share of masked patches in every frame", above=0, below=1)
    attention: str = key("auto", f"global attention: auto, {', '.join(BACKENDS)}", choices=("auto", *BACKENDS))
    compile: str = key("auto", "torch.compile: off, block (each kind), full (one graph) or auto", choices=COMPILE_MODES)
    recompute: str = key(
        "auto", "activations recomputed in the backward pass, to save memory: none, mlp (inside the MLPs), blocks "
        "(everything inside blocks); auto: mlp on CUDA, none on the CPU", choices=("auto", "none", "mlp", "blocks"),
    )  # fmt: skip


@dataclass
class LossSection:
    """The masked reconstruction loss."""

    norm_pix: bool = key(True, "normalise the pixels of each target patch by its mean and variance")


@dataclass
class DataSection(SourceSection):
    """Training data and sampling (supplement, "Sampling"; crops from the released code)."""

    image_root: str | None = key(None, "folder of single images, at any depth", is_path=True)
    imagenet_share: float = key(0.1, "share of single images (ImageNet-1K in the paper), if any", least=0, most=1)
    mode: str = key(
        "packed",
        "paper: one number of views a batch; packed: full batches; balanced: also equal costs",
        choices=("paper", "packed", "balanced"),
    )
    image_size: int = key(256, "side of a training frame in pixels", least=1)
    views: list[int] = key([2, 24], "fewest and most views of a sequence (paper's probabilities)", above=0, length=2)
    frames_per_batch: int = key(96, "frames that a device computes at once; in the mode paper, at most", least=1)
    frames_per_step: int | None = key(
        None, "frames of an optimizer step over all devices, a multiple of frames_per_batch; micro-batches beyond one "
        "per device are accumulated. Empty: one batch per device, or the value of the resumed run"
    )  # fmt: skip
    crop_scale: list[float] = key([0.2, 1.0], "share of a frame's area in a random crop", above=0, most=1, length=2)
    crop_aspect: list[float] = key([0.75, 1.3333333], "aspect ratio of a random crop", above=0, length=2)
    flip: float = key(0.5, "probability of a horizontal flip, drawn for each frame", least=0, most=1)
    decoder: str = key(
        "auto", "auto, dali (on the GPU), dali_cpu or pillow", choices=("auto", "dali", "dali_cpu", "pillow")
    )
    workers: int = key(2, "threads that decode images", least=1)
    cache_gb: float = key(1.0, "memory for decoded images in GB, for pillow; saves decoding if they fit", least=0)


@dataclass
class Config(EngineConfig):
    """Everything that a pretraining run depends on."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    loss: LossSection = field(default_factory=LossSection)

    @property
    def model_config(self) -> ModelConfig:
        """The preset with the sizes that the run overrides; ConfigError if they do not fit."""
        names = {f.name for f in dataclasses.fields(ModelConfig)}
        given = {k: v for k, v in dataclasses.asdict(self.model).items() if k in names and v is not None}
        try:
            return dataclasses.replace(PRESETS[self.model.preset], **given)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from None

    def check(self) -> None:
        """Check rules between keys of model and data."""
        super().check()
        data, scenes, patch_size = self.data, self.data.scenes, self.model_config.patch_size
        batch, step, size = data.frames_per_batch, data.frames_per_step, data.image_size
        pairs = [(name, getattr(data, name)) for name in ("views", "crop_scale", "crop_aspect")]
        rules = [
            *((name, pair, pair[0] <= pair[1], "[least, most]") for name, pair in pairs),
            ("views", data.views, data.views[1] <= batch, "at most data.frames_per_batch"),
            ("image_size", size, size > 0 and size % patch_size == 0,
             f"a positive multiple of the patch size {patch_size}"),
            ("frames_per_step", step, step is None or (step > 0 and step % batch == 0),
             f"a positive multiple of data.frames_per_batch ({batch})"),
            ("scenes.views", scenes.views, not data.embedded or scenes.views >= data.views[0],
             "at least the fewest data.views"),
        ]  # fmt: skip
        data.refuse(rules)
        try:
            num_visible((size // patch_size) ** 2, self.model.mask_ratio)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from None
