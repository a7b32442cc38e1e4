"""Fixtures of the kernel tests: the implementation under test, and memory that shows when it was not written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import DEVICE


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the PyTorch and with the Triton implementation, interpreted where there is no GPU."""
    if request.param == "triton" and DEVICE == "cpu":
        triton = pytest.importorskip("triton")
        assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before the first import of Triton"
    monkeypatch.setenv("FASTMUM_KERNELS", request.param)
    return request.param


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Errors in bfloat16 are compared with errors: chance decides nothing."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` in the host wrappers returns NaN: what a kernel leaves unwritten shows."""
    plain = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        out = plain(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and out.device.type != "meta" else out

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates float32 to bfloat16, where the GPU rounds to the nearest: correct it."""
    if DEVICE != "cpu":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    plain = interpreter._convert_float

    def convert(data: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        if (str(source), str(target)) == ("fp32", "bf16"):
            return torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16).view(torch.uint16).numpy()
        return plain(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
