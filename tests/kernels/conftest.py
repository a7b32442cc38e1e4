"""Fixtures of the kernel tests: the implementation under test, and what its numbers need."""

import numpy as np
import pytest
import torch
from support import DEVICE

from fastmum.kernels.plans import reset


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the PyTorch and with the Triton implementation, interpreted without a GPU."""
    if request.param == "triton" and DEVICE == "cpu":
        triton = pytest.importorskip("triton")
        assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before the first import of Triton"
    monkeypatch.setenv("FASTMUM_KERNELS", request.param)
    reset()
    return request.param


@pytest.fixture(params=["fused", "library"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with fused and with library products."""
    monkeypatch.setenv("FASTMUM_PRODUCTS", request.param)
    reset()
    return request.param


@pytest.fixture(autouse=True)
def same_numbers_and_nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors in bfloat16 are compared with errors, so inputs must not vary.

    `torch.empty` in the host wrappers returns NaN, to detect memory that a kernel does not write.
    """
    torch.manual_seed(0)
    plain = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        out = plain(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and out.device.type != "meta" else out

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round float32 to the nearest bfloat16 as a GPU does; the interpreter truncates."""
    if DEVICE != "cpu":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    plain = interpreter._convert_float

    def convert(data: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        if (str(source), str(target)) == ("fp32", "bf16"):
            return torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16).view(torch.uint16).numpy()
        return plain(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
