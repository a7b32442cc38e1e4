"""Which implementation runs, and that importing the kernels asks for nothing."""

import os
import subprocess
import sys

import pytest
import torch

from fastmum.kernels.dispatch import power_of_2, use_triton


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMUM_KERNELS")}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


def test_choice(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.delenv("FASTMUM_KERNELS", raising=False)
    assert not use_triton(x)
    monkeypatch.setenv("FASTMUM_KERNELS", "triton")
    assert use_triton(x)
    assert not use_triton(x.double())
    monkeypatch.setenv("FASTMUM_KERNELS", "cuda")
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
