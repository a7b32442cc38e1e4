"""Loading weights of runs, exports, released files and other encoders, detected by content: `load_encoder`."""

from fastmum.pretrained.layout import MismatchError, WeightsError
from fastmum.pretrained.load import Pretrained, build, load_encoder, load_pretrained, read_pretrained

__all__ = [
    "MismatchError", "Pretrained", "WeightsError", "build", "load_encoder", "load_pretrained", "read_pretrained",
]  # fmt: skip
