"""Shared fixtures: the project's test data, a tiny model and a folder of small images."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from released import Released

from fastmum import ModelConfig, MuM

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = ModelConfig(32, 2, 2, 32, 2, 2)


@pytest.fixture(autouse=True)
def forget_choices_of_kernels() -> Iterator[None]:
    """Environment variables are read once; other tests set others."""
    yield
    if plans := sys.modules.get("fastmum.kernels.plans"):
        plans.reset()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the project's test data, which is not in the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"test data of the project are absent: no {SHARED.name}/ next to the checkout")
    return SHARED


@pytest.fixture(params=["reference_square", "reference_wide"])
def released(request, shared: Path) -> Released:
    return Released(shared / "parity" / f"{request.param}.safetensors")


@pytest.fixture
def refusal(capsys):
    """Calls a command that must end with exit code 2 and one line of error; returns that line."""

    def call(main, *words: object) -> str:
        assert main([*map(str, words)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return call


@pytest.fixture
def tiny() -> MuM:
    """A tiny model with fixed weights."""
    torch.manual_seed(0)
    return MuM(TINY)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Four scenes of six smooth random images of 48 x 40 pixels."""
    rng = np.random.default_rng(0)
    for scene in range(4):
        folder = tmp_path / f"images/scene{scene}"
        folder.mkdir(parents=True)
        for view, pixels in enumerate(rng.integers(0, 256, (6, 5, 6, 3), dtype=np.uint8)):
            Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{view}.png")
    return tmp_path / "images"
