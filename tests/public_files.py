"""Files with outputs of public code, from FASTMUM_FIXTURES, else ../shared/downstream/fixtures next to the checkout.

Every file of a layout is run, whatever its prefix.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1].parent / "shared/downstream/fixtures"
FIXTURES = Path(os.environ.get("FASTMUM_FIXTURES") or ROOT)


def files(folder: str, ending: str) -> list[Any]:
    """The files `*_ending` of a folder as parameters; one skipped parameter where there are none."""
    if os.environ.get("FASTMUM_FIXTURES") and not FIXTURES.is_dir():
        raise FileNotFoundError(f"FASTMUM_FIXTURES: there is no folder '{FIXTURES}'")
    found = sorted((FIXTURES / folder).glob(f"*_{ending}"))
    absent = pytest.mark.skip(reason=f"no {folder}/*_{ending} in {FIXTURES}: set FASTMUM_FIXTURES")
    return [pytest.param(file, id=file.stem) for file in found] or [pytest.param(Path(), marks=absent, id="absent")]


def sizes_of(file: Path) -> dict[str, Any]:
    """The configuration that a file states."""
    return json.loads(safe_open(file, "pt").metadata()["config"])


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def error(found: Tensor | None, expected: Tensor) -> float:
    """Largest error over the largest value; infinite values (focal lengths of no field of view) must agree."""
    assert found is not None
    assert found.shape == expected.shape
    infinite = expected.isinf()
    assert torch.equal(found[infinite], expected[infinite])
    found, expected = (torch.where(infinite, 0, x).detach() for x in (found, expected))
    worst, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    return worst / largest if largest else worst
