"""Features of images: `python -m fastmum.features IMAGES --weights W --out FILE`, or `extract` from Python."""

from fastmum.features.errors import FeaturesError
from fastmum.features.extract import Tokens, extract
from fastmum.features.images import Images, Sizing, find_images
from fastmum.features.store import read_features, write_features

__all__ = [
    "FeaturesError",
    "Images",
    "Sizing",
    "Tokens",
    "extract",
    "find_images",
    "read_features",
    "write_features",
]
