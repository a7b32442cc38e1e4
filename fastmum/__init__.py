"""fastmum: fast pretraining of MuM-style multi-view masked image encoders.

The public names below are imported on first use, so that `import fastmum` costs next to nothing and needs no GPU.
"""

import importlib
import os.path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmum.model.config import PRESETS, ModelConfig
    from fastmum.model.mum import MuM, MuMOutput
    from fastmum.pretrained import load_encoder, load_pretrained

__version__ = "0.1.0"
__all__ = ["PRESETS", "ModelConfig", "MuM", "MuMOutput", "load_encoder", "load_pretrained"]

if not os.path.isdir(os.path.join(__path__[0], "kernels")):  # a checkout, where `kernels/` is next to this folder
    __path__.append(os.path.dirname(__path__[0]))

_HOME = dict.fromkeys(("ModelConfig", "PRESETS"), "fastmum.model.config")
_HOME |= dict.fromkeys(("MuM", "MuMOutput"), "fastmum.model.mum")
_HOME |= dict.fromkeys(("load_encoder", "load_pretrained"), "fastmum.pretrained")


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fastmum' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
