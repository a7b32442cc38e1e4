"""Shared fixtures: where the project's test data lie, tiny models and folders of small images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmum import ModelConfig, MuM

SHARED = Path(__file__).resolve().parents[2] / "shared"

TINY = ModelConfig(32, 2, 2, 32, 2, 2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's test data, which are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"test data of the project are absent: no {SHARED.name}/ beside the checkout")
    return SHARED


@pytest.fixture
def tiny() -> MuM:
    """A model small enough for any test, the same every time."""
    torch.manual_seed(0)
    return MuM(TINY)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Four scenes of six smooth random images of 48 x 40 pixels."""
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for scene in range(4):
        folder = root / f"scene{scene}"
        folder.mkdir(parents=True)
        coarse = rng.integers(0, 256, (6, 5, 6, 3), dtype=np.uint8)
        for view, pixels in enumerate(coarse):
            Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{view}.png")
    return root
