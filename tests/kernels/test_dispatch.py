"""Which implementation runs, that importing the kernels asks for nothing, and training on either implementation."""

import os
import subprocess
import sys

import pytest
import torch
from asserts import assert_equal
from support import DEVICE

from fastmum import ModelConfig, MuM
from fastmum.kernels.dispatch import power_of_2, use_triton
from fastmum.kernels.plans import reset


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMUM_KERNELS")}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


def test_choice(monkeypatch):
    x = torch.zeros(1, device=DEVICE)
    monkeypatch.delenv("FASTMUM_KERNELS", raising=False)
    reset()
    assert use_triton(x) == (DEVICE == "cuda")
    assert not use_triton(x.cpu())
    monkeypatch.setenv("FASTMUM_KERNELS", "triton")
    assert not use_triton(x.cpu()), "it is read once"
    reset()
    assert use_triton(x)
    assert not use_triton(x.double())
    monkeypatch.setenv("FASTMUM_KERNELS", "torch")
    reset()
    assert not use_triton(x)
    monkeypatch.setenv("FASTMUM_KERNELS", "cuda")
    reset()
    with pytest.raises(ValueError, match="FASTMUM_KERNELS"):
        use_triton(x)


def test_triton_on_the_cpu_needs_the_interpreter():
    code = "import torch; from fastmum.kernels.dispatch import use_triton; use_triton(torch.zeros(1))"
    result = run(code, FASTMUM_KERNELS="triton", CUDA_VISIBLE_DEVICES="")
    assert "TRITON_INTERPRET=1" in result.stderr


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from fastmum.kernels import gather_patches, patch_loss, rope_qk, scatter_tokens, gather_tokens\n"
        "ids = torch.zeros(1, 1, dtype=torch.int64)\n"
        "frames = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)\n"
        "x = gather_patches(frames, ids, (0.,)*3, (1.,)*3, 8, torch.float32)\n"
        "patch_loss(x, frames, ids, (0.,)*3, (1.,)*3, 8)\n"
        "print(gather_tokens(scatter_tokens(torch.ones(1, 2, 4), torch.zeros(4), ids, 3), ids).sum().item())"
    )
    result = run(code)
    assert result.stdout == "4.0\n", result.stderr


def test_import_touches_no_device_and_compiles_nothing():
    code = (
        "import torch, sys\n"
        "def fail(*a, **k): raise AssertionError('device query at import time')\n"
        "torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.get_device_capability = fail\n"
        "import fastmum.kernels\n"
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    result = run(code)
    assert result.stdout == "False\n", result.stderr


def test_power_of_2():
    assert [power_of_2(n) for n in (0, 1, 3, 48, 64, 65)] == [1, 1, 4, 64, 64, 128]


def losses(autocast: bool) -> list[torch.Tensor]:
    """Of a few steps; and the parameters after them."""
    torch.manual_seed(0)
    model, history = MuM(ModelConfig(32, 1, 2, 32, 2, 2, patch_size=8)).to(DEVICE), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    frames = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model(frames, [2], 0.5, torch.rand(2, 4, device=DEVICE)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.detach())
    return [*history, *model.parameters()]


def test_training(monkeypatch):
    """Repeated, the same bits, as all sums have a fixed order; with either implementation, the same losses."""
    pytest.importorskip("triton")
    found = {}
    for name in ("torch", "triton"):
        monkeypatch.setenv("FASTMUM_KERNELS", name)
        reset()
        assert_equal(losses(autocast=True), losses(autocast=True))
        found[name] = torch.stack(losses(autocast=False)[:3])
    torch.testing.assert_close(found["triton"], found["torch"], rtol=1e-4, atol=0)
