"""Loading weights of runs, exports, released files and transformers, detected by content: `load_pretrained`."""

from fastmum.pretrained.layout import MismatchError, WeightsError
from fastmum.pretrained.load import Pretrained, build, load_pretrained, read_pretrained

__all__ = ["MismatchError", "Pretrained", "WeightsError", "build", "load_pretrained", "read_pretrained"]
