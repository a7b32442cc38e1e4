"""timm's models by name, in the local cache of the Hugging Face hub, or by path; nothing is downloaded."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmum.files import expand_user
from fastmum.pretrained.layout import WeightsError

# Architectures that compute the same as MAE or DINOv3; also plain ViTs with CLS, such as DINO's and AugReg's.
SAME = r"vit_(tiny|small|base|large|huge)_patch\d+_(\d+|dinov3(_qkvb)?)"
FILES = ("model.safetensors", "pytorch_model.bin")
LOCAL = "local-dir:"  # timm's own prefix


def find_timm(name: str) -> tuple[Path, Mapping[str, Any]]:
    """The file of a model, and its `pretrained_cfg`; a path of a folder or a file has no such table here.

    WeightsError: timm is not installed, has no such model, or the weights are not on this machine.
    """
    if (path := expand_user(name.removeprefix(LOCAL))).exists():
        return path, {}
    check_architecture(Path(name), {"architecture": name.partition(".")[0]})
    try:
        import timm
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        raise WeightsError(f"timm:{name} is no path, and names need timm: pip install timm") from None
    known = timm.is_model(name) and timm.is_model_pretrained(name)
    found = timm.get_pretrained_cfg(name) if known else None
    if found is None or not found.hf_hub_id:
        raise WeightsError(f"timm {timm.__version__} has no weights '{name}' on the hub")
    about = found.to_dict()
    names = [about["hf_hub_filename"]] if about.get("hf_hub_filename") else FILES
    for file in names:
        if isinstance(cached := try_to_load_from_cache(about["hf_hub_id"], file), str):
            return Path(cached), about
    raise WeightsError(
        f"the weights of timm:{name} are not in the local cache: `hf download {about['hf_hub_id']}` fetches them"
    )


def check_architecture(path: Path, config: Mapping[str, Any]) -> None:
    """Raise WeightsError if a folder's config.json names an architecture of timm with another computation."""
    name = config.get("architecture")
    if name is not None and not re.fullmatch(SAME, str(name)):
        raise WeightsError(f"'{path}' is timm's {name}, which fastmum's encoder does not compute")
