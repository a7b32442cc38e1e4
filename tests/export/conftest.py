"""Weights on disk, and images to compare features of."""

import pytest
import torch

from fastmum import ModelConfig, MuM
from fastmum.export import released_state


def lively(config: ModelConfig) -> MuM:
    """A model whose blocks change features a lot, unlike one that is fresh."""
    torch.manual_seed(0)
    model = MuM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def model() -> MuM:
    return lively(ModelConfig(48, 3, 4, 32, 2, 1, norm_eps=1e-6))


@pytest.fixture
def weights(model, tmp_path):
    """A file of the whole model."""
    torch.save(released_state(model.state_dict(), encoder_only=False), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def images():
    """Normalised, neither square nor of the size that anything was made for."""
    return torch.randn(3, 3, 48, 80, generator=torch.Generator().manual_seed(1))
