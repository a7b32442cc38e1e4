"""Configuration of reconstruction: the engine's sections, and those of model, data and loss."""

from dataclasses import dataclass, field

from fastmum.attention import BACKENDS
from fastmum.config.schema import OptimSection, key
from fastmum.tasks.reconstruction.data import SceneDataSection
from fastmum.tasks.reconstruction.losses import LossWeights
from fastmum.tasks.reconstruction.model import RECOMPUTE, ReconstructionConfig
from fastmum.tasks.trained import EncoderConfig, EncoderSection

PAPER = ReconstructionConfig()


@dataclass
class ReconstructionSection(EncoderSection):
    """Encoder, and sizes of aggregator and heads (supplement B by default)."""

    finetune: bool = key(False, "train the encoder, too; otherwise it is frozen")
    encoder_lr_scale: float = key(1.0, "factor of the encoder's learning rate", above=0)
    embed_dim: int = key(PAPER.embed_dim, "width of the aggregator", least=1)
    pairs: int = key(PAPER.pairs, "pairs of a frame block and a global block", least=1)
    num_heads: int = key(PAPER.num_heads, "heads of the aggregator", least=1)
    registers: int = key(PAPER.registers, "register tokens of a frame", least=0)
    taps: list[int] = key([*PAPER.taps], "pairs that the dense heads read, from 0; a pair may come twice", length=4)
    points: bool = key(True, "whether there is a head of points")
    dpt_features: int = key(PAPER.dpt_features, "channels of the dense heads", least=1)
    dpt_levels: list[int] = key([*PAPER.dpt_levels], "channels of their four levels", length=4)
    camera_heads: int = key(PAPER.camera_heads, "attention heads of the camera head", least=1)
    camera_blocks: int = key(PAPER.camera_blocks, "blocks of the camera head", least=1)
    camera_iterations: int = key(PAPER.camera_iterations, "refinements of the cameras", least=1)
    attention: str = key("auto", f"attention across frames: auto, {', '.join(BACKENDS)}", choices=("auto", *BACKENDS))
    compile: str = key("auto", "torch.compile: off, block (each kind) or auto", choices=("auto", "block", "off"))
    recompute: str = key(
        "auto", "activations recomputed in the backward pass: none, blocks, all (also those of the dense heads); auto: "
        "blocks on CUDA, none on the CPU", choices=("auto", *RECOMPUTE),
    )  # fmt: skip
    chunk: int = key(8, "frames that a dense head computes at once", least=1)

    def sizes(self, encoder_dim: int, patch_size: int) -> ReconstructionConfig:
        """The sizes with an encoder; ConfigError if they do not fit."""
        return self.sizes_of(ReconstructionConfig, encoder_dim, patch_size)


@dataclass
class ReconstructionLossSection:
    """Weights of the loss's terms."""

    camera: float = key(5.0, "weight of the cameras' loss", least=0)
    depth: float = key(1.0, "weight of the depth loss", least=0)
    points: float = key(1.0, "weight of the point loss", least=0)
    camera_loss: str = key(
        "l1", "l1 (the authors' training code) or huber (their papers)", choices=("l1", "huber")
    )  # fmt: skip
    huber_delta: float = key(1.0, "huber: error where it becomes linear; the papers do not state it", above=0)


def _optim() -> OptimSection:
    """davnords/vggt: AdamW, linear from 1e-8 over 5 % of 100,000 steps, cosine to 1e-8, clipped in groups."""
    return OptimSection(
        base_lr=2e-4, lr_frames=0, betas=[0.9, 0.999], warmup_steps=5_000, warmup_lr=1e-8, min_lr=1e-8, clip=1.0
    )


@dataclass
class Config(EncoderConfig):
    """Everything that a run of reconstruction depends on."""

    optim: OptimSection = field(default_factory=_optim)
    model: ReconstructionSection = field(default_factory=ReconstructionSection)
    data: SceneDataSection = field(default_factory=SceneDataSection)
    loss: ReconstructionLossSection = field(default_factory=ReconstructionLossSection)

    @property
    def weights(self) -> LossWeights:
        return LossWeights(**vars(self.loss))
