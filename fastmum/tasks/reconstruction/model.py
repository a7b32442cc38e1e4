"""The model: encoder, aggregator and heads; `state_dict` has VGGT's names and shapes for all but the encoder."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastmum.model.encoder import Encoder
from fastmum.tasks.reconstruction.aggregator import Aggregator, Sequences
from fastmum.tasks.reconstruction.camera import CameraHead
from fastmum.tasks.reconstruction.dpt import LEVELS, Dpt
from fastmum.tasks.reconstruction.losses import Prediction

RECOMPUTE = ("none", "blocks", "all")


@dataclass(frozen=True)
class ReconstructionConfig:
    """Sizes; a ValueError names an invalid one. Defaults are those of the MuM paper (supplement B)."""

    encoder_dim: int = 1024  # width of the encoder's tokens
    embed_dim: int = 1024  # of the aggregator
    pairs: int = 6  # of a frame block and a global block
    num_heads: int = 16
    registers: int = 0
    patch_size: int = 16
    taps: tuple[int, ...] = (2, 3, 4, 5)  # pairs that the dense heads read, counted from 0
    points: bool = True  # whether there is a point head
    dpt_features: int = 256
    dpt_levels: tuple[int, ...] = (256, 512, 1024, 1024)
    camera_heads: int = 16
    camera_blocks: int = 4
    camera_iterations: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else [value]
            least = 0 if name in ("registers", "taps", "points") else 1
            if any(number < least for number in numbers):
                raise ValueError(f"{name} is {value}, but must be at least {least}")
        for name, value, divisor, why in (
            ("embed_dim", self.embed_dim, 4 * self.num_heads, "4 * num_heads: a sine and a cosine for each axis"),
            ("embed_dim", 2 * self.embed_dim, self.camera_heads, "the camera head's heads / 2"),
            *(("dpt_levels", channels, 4, "4: a sine and a cosine for each axis") for channels in self.dpt_levels),
            ("dpt_features", self.dpt_features, 8, "8: a sine and a cosine for each axis in half of them"),
        ):
            if value % divisor:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be a multiple of {why}")
        if len(self.taps) != LEVELS or max(self.taps) >= self.pairs:
            raise ValueError(f"taps is {list(self.taps)}, but must be {LEVELS} pairs of 0 to {self.pairs - 1}")
        if len(self.dpt_levels) != LEVELS:
            raise ValueError(f"dpt_levels is {list(self.dpt_levels)}, but must be {LEVELS} numbers of channels")


class Reconstruction(nn.Module):
    """Frames of scenes -> cameras, depth and points.

    Args:
        encoder: its normed patch tokens are what the aggregator reads; None if `predict` gets tokens.
    """

    def __init__(self, config: ReconstructionConfig, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config, dim = config, 2 * config.embed_dim
        self.encoder = encoder
        self.aggregator = Aggregator(
            config.encoder_dim, config.embed_dim, config.pairs, config.num_heads, config.registers
        )
        self.camera_head = CameraHead(dim, config.camera_heads, config.camera_blocks, config.camera_iterations)
        dense = config.dpt_features, config.dpt_levels
        self.depth_head = Dpt(dim, 1, "exp", *dense)
        self.point_head = Dpt(dim, 3, "inv_log", *dense) if config.points else None

    def set_recompute(self, what: str) -> None:
        """Set what the backward pass recomputes instead of saving it, in place; results do not change.

        "none"; "blocks": of the aggregator; "all": also the dense heads, chunk by chunk. ValueError: another value.
        """
        if what not in RECOMPUTE:
            raise ValueError(f"recompute is '{what}', but must be one of {', '.join(RECOMPUTE)}")
        self.aggregator.recompute = what != "none"
        for head in self.dense_heads():
            head.recompute = what == "all"

    def dense_heads(self) -> list[Dpt]:
        """The heads of depth and points."""
        return [head for head in (self.depth_head, self.point_head) if head is not None]

    def forward(self, images: Tensor, lengths: Sequence[int], longest: int | None = None) -> Prediction:
        """Predict from packed sequences of `lengths` frames, at most `longest`; images as in `Encoder.tokens`."""
        assert self.encoder is not None
        (tokens,) = self.encoder.tokens(images, norm=True)
        return self.predict(tokens.patch, tokens.grid, Sequences.of(lengths, images.device), longest)

    def predict(
        self, patches_FPE: Tensor, grid: tuple[int, int], sequences: Sequences, longest: int | None = None
    ) -> Prediction:
        """Predict from the encoder's patch tokens (F, P, E)."""
        config = self.config
        *taps, last = self.aggregator(patches_FPE, grid, sequences, (*config.taps, config.pairs - 1), longest)
        cameras = self.camera_head(last.select(tokens=slice(0, 1))[:, 0], sequences)
        depth, depth_confidence = self.depth_head(taps, grid, config.patch_size)
        points = points_confidence = None
        if self.point_head is not None:
            points, points_confidence = self.point_head(taps, grid, config.patch_size)
        return Prediction(cameras, depth, depth_confidence, points, points_confidence)
