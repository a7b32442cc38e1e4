"""Features of images: `python -m fastmum.features IMAGES --weights W --out FILE`, or `extract` from Python."""

from fastmum.features.cache import FeatureCache, file_key, frozen_tokens, image_key
from fastmum.features.extract import extract
from fastmum.features.images import FeaturesError, Images, Sizing, find_images
from fastmum.features.store import Tokens, read_features, write_features

__all__ = [
    "FeatureCache", "FeaturesError", "Images", "Sizing", "Tokens", "extract", "file_key", "find_images",
    "frozen_tokens", "image_key", "read_features", "write_features",
]  # fmt: skip
