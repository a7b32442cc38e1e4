"""Weights of others and of our own, told apart by what is in them: `load_pretrained`."""

from fastmum.pretrained.errors import MismatchError, WeightsError
from fastmum.pretrained.load import Pretrained, build, load_pretrained, read_pretrained

__all__ = ["MismatchError", "Pretrained", "WeightsError", "build", "load_pretrained", "read_pretrained"]
