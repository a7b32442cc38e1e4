"""Sizes of the model, and the presets people ask for by name.

Sizes of the paper's model: supplement, section A "Architecture".
"""

from __future__ import annotations

from dataclasses import dataclass, fields

COMPILE_MODES = ("auto", "block", "full", "off")
MLP_RATIO = 4  # hidden width of every MLP over its block's width


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of encoder and decoder.

    Args:
        embed_dim, depth, num_heads: width, blocks and heads of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the same of the decoder; its depth counts frame and
            global blocks together, which alternate, so it is even.
        patch_size: side of a square patch in pixels.
        in_chans: channels of a frame.
        norm_eps: epsilon of every LayerNorm; 1e-5 in the released training configuration.

    Raises:
        ValueError: a size that cannot work, named with its value and what is allowed.
    """

    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    patch_size: int = 16
    in_chans: int = 3
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "norm_eps":
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                    raise ValueError(f"norm_eps is {value!r}, but must be a number between 0 and 1")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} is {value!r}, but must be a positive integer")
        for width, heads in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
            if getattr(self, width) % (4 * getattr(self, heads)):
                raise ValueError(
                    f"{width} is {getattr(self, width)} with {heads} {getattr(self, heads)}, but a head's width "
                    f"({width} / {heads}) must be a multiple of 4: a sine and a cosine for each image axis"
                )
        if self.decoder_depth % 2:
            raise ValueError(
                f"decoder_depth is {self.decoder_depth}, but must be even: frame and global blocks alternate"
            )


PRESETS: dict[str, ModelConfig] = {
    "mum_vitl16": ModelConfig(1024, 24, 16, 768, 12, 12),
    # The released weights were trained with 16 decoder heads; the shapes in the file cannot tell.
    "mum_vitl16_released": ModelConfig(1024, 24, 16, 768, 12, 16),
    "mum_vitb16": ModelConfig(768, 12, 12, 512, 8, 16),
    "mum_tiny": ModelConfig(192, 6, 3, 128, 4, 4),
}
