"""Configuration of relative pose: the engine's sections, and those of model and data."""

from dataclasses import dataclass, field

from fastmum.config.schema import OptimSection, key
from fastmum.model.encoder import RECOMPUTE
from fastmum.tasks.pairs import PairDataSection
from fastmum.tasks.pose.model import PoseConfig
from fastmum.tasks.trained import EncoderConfig, EncoderSection

PAPER = PoseConfig()


@dataclass
class PoseSection(EncoderSection):
    """Encoder, and sizes of the decoder (supplement B by default)."""

    finetune: bool = key(True, "train the encoder, too; otherwise it is frozen")
    encoder_lr_scale: float = key(0.1, "factor of the encoder's learning rate", above=0)
    normalisation: str = key(
        "half", "of images: half, (x - 0.5) / 0.5 for any encoder, as Reloc3r; encoder, its own",
        choices=("half", "encoder"),
    )  # fmt: skip
    embed_dim: int = key(PAPER.embed_dim, "width of the decoder", least=1)
    depth: int = key(PAPER.depth, "blocks of the decoder", least=1)
    num_heads: int = key(PAPER.num_heads, "heads of the decoder", least=1)
    head_dim: int | None = key(None, "width of the head. Empty: 4 patch_size**2, as Reloc3r's", least=1)
    compile: str = key("auto", "torch.compile: off, block (each kind) or auto", choices=("auto", "block", "off"))
    recompute: str = key(
        "auto", "activations recomputed in the backward pass, as in pretraining: none, mlp, blocks; auto: mlp on CUDA, "
        "none on the CPU", choices=("auto", *RECOMPUTE),
    )  # fmt: skip

    def sizes(self, encoder_dim: int, patch_size: int) -> PoseConfig:
        """The sizes with an encoder; ConfigError if they do not fit."""
        return self.sizes_of(PoseConfig, encoder_dim, patch_size, head_dim=self.head_dim or 4 * patch_size**2)


def _optim() -> OptimSection:
    """Supplement B and davnords/reloc3r: 100 epochs of 2.25 M pairs, 1,024 a step: 5 epochs of warm-up, cosine."""
    return OptimSection(base_lr=2e-4, lr_frames=0, betas=[0.9, 0.95], warmup_steps=10_986, min_lr=1e-6)


@dataclass
class Config(EncoderConfig):
    """Everything that a run of relative pose depends on."""

    optim: OptimSection = field(default_factory=_optim)
    model: PoseSection = field(default_factory=PoseSection)
    data: PairDataSection = field(default_factory=PairDataSection)
