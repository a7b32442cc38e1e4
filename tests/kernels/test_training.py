"""A model on the Triton kernels: repeatable, and as good as on PyTorch."""

import pytest
import torch
from asserts import assert_equal
from support import DEVICE

from fastmum import ModelConfig, MuM


def losses(steps: int, autocast: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = MuM(ModelConfig(32, 1, 2, 32, 2, 2, patch_size=8)).to(DEVICE)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    frames = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, device=DEVICE)
    history = []
    for _ in range(steps):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model(frames, [2], 0.5, torch.rand(2, 4, device=DEVICE)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.detach())
    return [*history, *model.parameters()]


def test_the_same_twice(backend: str) -> None:
    """All sums have a fixed order."""
    assert_equal(losses(2, autocast=True), losses(2, autocast=True))


@pytest.mark.slow
def test_twenty_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("FASTMUM_KERNELS", backend)
        found[backend] = torch.stack(losses(20)[:20])
    assert found["torch"][-1] < 0.9 * found["torch"][0]  # it learns
    torch.testing.assert_close(found["triton"], found["torch"], rtol=1e-4, atol=0)
