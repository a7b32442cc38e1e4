"""Configuration of matching: the engine's sections, and those of model and data."""

from dataclasses import dataclass, field

from fastmum.config.schema import OptimSection, key
from fastmum.tasks.roma.data import RomaDataSection
from fastmum.tasks.roma.model import RomaConfig
from fastmum.tasks.trained import EncoderConfig, EncoderSection

PAPER = RomaConfig()
RANDOM = "random"


@dataclass
class RomaSection(EncoderSection):
    """Encoders, and sizes of the decoder (RoMa's by default); lists are of strides 16, 8, 4, 2, 1."""

    fine: str = key(
        RANDOM, "weights of the fine encoder: a file of torchvision's vgg19_bn; random: none", is_path="weights"
    )
    fine_lr_scale: float = key(0.05, "factor of the fine encoder's learning rate", above=0)
    vgg: list[int] = key([*PAPER.vgg], "channels of the fine encoder at strides 1, 2, 4, 8", length=4)
    vgg_layers: list[int] = key([*PAPER.vgg_layers], "its convolutions of each stride", length=4)
    projected: list[int] = key([*PAPER.projected], "channels that are matched", length=5)
    displacement: list[int] = key([*PAPER.displacement], "channels of the embedded displacement", length=5)
    radius: list[int] = key([*PAPER.radius], "radius of the local correlation; 0: none", length=5)
    gp_dim: int = key(PAPER.gp_dim, "Fourier features of the coordinates", least=1)
    num_heads: int = key(PAPER.num_heads, "heads of the coarse transformer", least=1)
    blocks: int = key(PAPER.blocks, "its blocks", least=0)
    anchors: int = key(PAPER.anchors, "side of the grid of anchors", least=1)
    hidden_blocks: int = key(PAPER.hidden_blocks, "blocks of a refiner after its first", least=0)
    compile: str = key("auto", "torch.compile: off, block (each kind) or auto", choices=("auto", "block", "off"))
    finetune = False  # the encoder is frozen

    def sizes(self, encoder_dim: int, patch_size: int) -> RomaConfig:
        """The sizes with an encoder; ConfigError if they do not fit."""
        return self.sizes_of(RomaConfig, encoder_dim, patch_size)


def _optim() -> OptimSection:
    """Parskatt/RoMa: AdamW, 1e-4 for 8 pairs and so 4e-4 for 32, times 0.1 after 90 %, clipped at 0.01."""
    return OptimSection(
        base_lr=4e-4, lr_frames=32, weight_decay=0.01, betas=[0.9, 0.999], warmup_steps=0, clip=0.01, schedule="step",
        milestones=[84_375],
    )  # fmt: skip


@dataclass
class Config(EncoderConfig):
    """Everything that a run of matching depends on."""

    optim: OptimSection = field(default_factory=_optim)
    model: RomaSection = field(default_factory=RomaSection)
    data: RomaDataSection = field(default_factory=RomaDataSection)
