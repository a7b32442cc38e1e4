"""A model trained on the Triton kernels loses what one trained on PyTorch loses."""

from __future__ import annotations

import pytest
import torch
from support import DEVICE

from fastmum import ModelConfig, MuM


def losses(backend: str, monkeypatch: pytest.MonkeyPatch, steps: int = 20) -> torch.Tensor:
    monkeypatch.setenv("FASTMUM_KERNELS", backend)
    torch.manual_seed(0)
    model = MuM(ModelConfig(32, 1, 2, 32, 2, 2, patch_size=8)).to(DEVICE)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    frames = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, device=DEVICE)
    history = []
    for _ in range(steps):
        loss = model(frames, [2], 0.5, torch.rand(2, 4, device=DEVICE)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.detach())
    return torch.stack(history)


@pytest.mark.slow
def test_twenty_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    ours, plain = losses("triton", monkeypatch), losses("torch", monkeypatch)
    assert plain[-1] < 0.9 * plain[0]  # it learns
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=0)
