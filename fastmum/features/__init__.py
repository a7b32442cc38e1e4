"""Features of images: `python -m fastmum.features IMAGES --weights W --out FILE`, or `extract` from Python."""

from fastmum.features.extract import extract
from fastmum.features.images import FeaturesError, Images, Sizing, find_images
from fastmum.features.store import Tokens, read_features, write_features

__all__ = ["FeaturesError", "Images", "Sizing", "Tokens", "extract", "find_images", "read_features", "write_features"]
