"""The measured choice between fused kernels and library products: times are injected, kernels are interpreted."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmum.kernels import matmul
from fastmum.kernels.matmul import fuses_products, measured
from fastmum.kernels.plans import reset
from fastmum.model import products
from fastmum.model.config import ModelConfig
from fastmum.model.products import Call, calls_of, choose, choose_products

CPU, BF16 = torch.device("cpu"), torch.bfloat16
CONFIG = ModelConfig(32, 1, 2, 16, 2, 1, patch_size=8)
KEYS = [
    ("linear_gelu", 128, 32, BF16), ("linear_gelu_backward act", 32, 128, BF16), ("rotary_linear", 96, 32, BF16),
    ("linear_gelu", 64, 16, BF16), ("linear_gelu_backward mlp", 16, 64, BF16),
    *(("rotary_linear", rows, 16, BF16) for rows in (48, 16, 32)),
]  # fmt: skip


class Cuda(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[bool, float]]:
    """Milliseconds of fused kernels and of the library, by whether it is the fused one."""
    monkeypatch.setenv("FASTMUM_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTMUM_PRODUCTS", raising=False)
    monkeypatch.setattr(matmul, "use_triton", lambda x: True)
    monkeypatch.setattr(matmul, "architecture", lambda device: 90)
    times = {True: 1.0, False: 2.0}
    monkeypatch.setattr(products, "milliseconds", lambda call: times[measured[call.key]])
    measured.clear()
    yield times
    measured.clear()


def call(results: dict[bool, Sequence[Tensor]] | None = None) -> Call:
    key = "linear_gelu", 3, 2, BF16

    def operator(x: Tensor) -> Sequence[Tensor]:
        return [x] if results is None else results[measured[key]]

    return Call(key, operator, (torch.ones(4),))


def test_the_faster_one_is_chosen_and_kept(times, tmp_path, caplog) -> None:
    x, weight = Cuda(torch.zeros(1, 2, dtype=BF16)), torch.zeros(3, 2)
    assert not fuses_products(x, "linear_gelu", weight), "unmeasured on sm_90"
    with caplog.at_level(logging.INFO, "fastmum"):
        choose(iter([call()]), "H100")
    assert fuses_products(x, "linear_gelu", weight)
    assert not fuses_products(x, "rotary_linear", weight), "another operation"
    assert len(caplog.messages) == 1
    times[True] = 3.0
    choose(iter([call()]), "H100")
    assert measured == {call().key: True}, "from the cache"
    (file,) = tmp_path.glob("measured/products-*.json")
    assert json.loads(file.read_text())["ms"] == {"fused": 1.0, "library": 2.0}
    for damaged in ("", "[]", '{"ms": {"fused": 1.0}}', '{"ms": {"fused": 1.0, "library": "2"}}'):
        file.write_text(damaged)
        choose(iter([call()]), "H100")
        assert measured == {call().key: False}, "measured again"
    choose(iter([call()]), "H200")
    assert len([*tmp_path.glob("measured/*.json")]) == 2, "another GPU"


def test_unmeasured_and_forced(monkeypatch) -> None:
    x, weight = Cuda(torch.zeros(1, 2, dtype=BF16)), torch.zeros(3, 2)
    assert fuses_products(torch.zeros(1, dtype=BF16), "linear_gelu", weight), "interpreted"
    for architecture, fused in ((80, True), (90, False), (100, False)):
        monkeypatch.setattr(matmul, "architecture", lambda device, value=architecture: value)
        assert fuses_products(x, "linear_gelu", weight) == fused
    measured["linear_gelu", 3, 2, BF16] = False
    for forced in ("fused", "library"):
        monkeypatch.setenv("FASTMUM_PRODUCTS", forced)
        reset()
        assert fuses_products(x, "linear_gelu", weight) == (forced == "fused")


@pytest.mark.parametrize("wrong", [torch.full((4,), 1.1), torch.full((4,), float("nan")), None])
def test_a_kernel_that_fails_or_differs_is_not_used(times, tmp_path, caplog, wrong: Tensor | None) -> None:
    results = {False: [torch.ones(4)]} if wrong is None else {False: [torch.ones(4)], True: [wrong]}
    choose(iter([call(results)]), "H100")
    assert measured == {call().key: False}
    assert len(caplog.messages) == 1
    assert not [*tmp_path.glob("measured/*.json")], "it may work with another driver"


def test_an_error_of_the_library_is_the_runs_own() -> None:
    with pytest.raises(KeyError):
        choose(iter([call({True: [torch.ones(4)]})]), "H100")
    assert not measured


@pytest.mark.parametrize("recompute", ["mlp", "none", "blocks"])
def test_the_calls_are_those_of_a_step(monkeypatch, recompute: str) -> None:
    """Fused and library results agree for every call; keys are those that the operators ask for."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTMUM_KERNELS", "triton")
    reset()
    asked = []
    for module in ("feedforward", "projection"):
        target = f"fastmum.kernels.{module}.fuses_products"

        def fuses(x: Tensor, operation: str, weight: Tensor) -> bool:
            asked.append((operation, *weight.shape, x.dtype))
            return measured[asked[-1]]

        monkeypatch.setattr(target, fuses)
    calls = list(calls_of(CONFIG, 2, 9, 3, recompute, CPU, BF16))
    expected = KEYS if recompute == "mlp" else [(name.split(" ")[0], *rest) for name, *rest in KEYS]
    found = [made.key if recompute == "mlp" else (made.key[0].split(" ")[0], *made.key[1:]) for made in calls]
    assert [list(key) for key in found] == [list(key) for key in expected]
    choose(iter(calls), "CPU")
    assert set(asked) == {made.key for made in calls}
    assert measured == dict.fromkeys((made.key for made in calls), True)


def test_when_nothing_is_measured(monkeypatch) -> None:
    def no(*_: object) -> Iterator[Call]:
        raise AssertionError("measured")

    cuda = torch.device("cuda")
    monkeypatch.setattr(products, "calls_of", no)
    monkeypatch.setattr(products, "use_triton", lambda x: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    sizes = CONFIG, 2, 9, 3, "mlp"
    choose_products(*sizes, CPU, BF16)
    choose_products(*sizes, cuda, torch.float32)
    for name in ("fused", "library"):
        monkeypatch.setenv("FASTMUM_PRODUCTS", name)
        reset()
        choose_products(*sizes, cuda, BF16)
    monkeypatch.delenv("FASTMUM_PRODUCTS")
    reset()
    for module, name in (
        (torch, "are_deterministic_algorithms_enabled"), (torch.compiler, "is_compiling"),
        (torch.cuda, "is_current_stream_capturing"),
    ):  # fmt: skip
        with monkeypatch.context() as changed:
            changed.setattr(module, name, lambda: True)
            choose_products(*sizes, cuda, BF16)
    with pytest.raises(AssertionError, match="measured"):
        choose_products(*sizes, cuda, BF16)
