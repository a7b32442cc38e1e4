"""Compiled regions: one graph each, compiled once whatever the lengths, and the same results."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastmum import ModelConfig, MuM
from fastmum.model.block import Block
from fastmum.model.compile import CPU_STEPS_TO_PAY, blocks_of, compile_kinds, compile_model, eager, has_cpp_compiler
from fastmum.model.inputs import seeded_noise

F, SIDE = 8, 32
REGIONS = {"block": 4, "full": 1}  # encoder, frame, global and last blocks; everything


@pytest.fixture
def small() -> MuM:
    """A model with every kind of block."""
    torch.manual_seed(0)
    return MuM(ModelConfig(32, 2, 2, 32, 4, 2))


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr("fastmum.model.compile.has_cpp_compiler", lambda: True)


def batch(seed: int) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Frames, random lengths and noise."""
    rng = np.random.default_rng(seed)
    frames = torch.from_numpy(rng.integers(0, 256, (F, SIDE, SIDE, 3), dtype=np.uint8))
    lengths: list[int] = []
    while sum(lengths) < F:
        lengths.append(int(rng.integers(1, F - sum(lengths) + 1)))
    return frames, lengths, seeded_noise(0, 0, seed, F, 4)


def loss_and_gradients(model: MuM, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    frames, lengths, noise = batch(seed)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(frames, lengths, 0.5, noise).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.detach(), gradients


def assert_same(ours: tuple, theirs: tuple) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=0)
    for name, gradient in theirs[1].items():
        error = (ours[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 0.05, name  # bfloat16, fused differently


@pytest.mark.parametrize(("mode", "recompute"), [("block", "none"), ("full", "blocks"), ("block", "blocks")])
def test_random_lengths_compile_each_region_once(small, compiler, mode, recompute):
    plain = copy.deepcopy(small)
    small.set_recompute(recompute)
    counter = CompileCounterWithBackend("aot_eager")
    assert compile_model(small, mode, steps=1, backend=counter) == mode
    for seed in range(4):
        assert_same(loss_and_gradients(small, seed), loss_and_gradients(plain, seed))
    assert counter.frame_count == REGIONS[mode]
    assert len({tuple(batch(seed)[1]) for seed in range(4)}) > 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_whole_model_compiles_from_outside_with_padded_lengths(tiny):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tiny, fullgraph=True, backend=counter)
    for seed in range(4):
        frames, lengths, noise = batch(seed)
        padded = torch.tensor(lengths + [0] * (F - len(lengths)))
        losses = compiled(frames, padded, 0.5, noise).loss, tiny(frames, lengths, 0.5, noise).loss
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.exhaustive
@pytest.mark.skipif(not has_cpp_compiler(), reason="Inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("mode", REGIONS)
def test_inductor_agrees_with_eager(small, mode):
    plain = copy.deepcopy(small)
    compile_model(small, mode, steps=1)
    for seed in range(3):
        assert_same(loss_and_gradients(small, seed), loss_and_gradients(plain, seed))


@pytest.mark.parametrize("mode", REGIONS)
def test_evaluation_compiles_nothing(tiny, compiler, mode):
    """But what is compiled separately stays compiled: FlexAttention would hold the scores of all pairs of tokens."""
    counter, separate = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    compile_model(tiny, mode, steps=1, backend=counter)
    frames, lengths, noise = batch(0)
    with eager(tiny), torch.no_grad():
        tiny(frames, lengths, 0.5, noise)
        torch.compile(lambda x: 2 * x, backend=separate)(torch.ones(3))
    assert (counter.frame_count, separate.frame_count) == (0, 1)
    tiny(frames, lengths, 0.5, noise)
    assert counter.frame_count > 0, "afterwards regions are compiled as before"


@pytest.mark.parametrize(("mode", "guard"), [("block", torch.inference_mode), ("full", torch.no_grad)])
def test_compiled_regions_without_gradients_and_in_copies(small, compiler, mode, guard):
    plain = copy.deepcopy(small)
    compile_model(small, mode, steps=1, backend="aot_eager")
    twin = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    frames, lengths, noise = batch(0)
    with guard():
        assert not twin(frames, lengths, 0.5, noise).pred.any()
        torch.testing.assert_close(small(frames, lengths, 0.5, noise).loss, plain(frames, lengths, 0.5, noise).loss)


def test_modes_on_a_cpu(tiny, compiler, caplog):
    caplog.set_level(logging.INFO)
    for mode, steps, chosen in (
        ("auto", 100, "off"), ("auto", CPU_STEPS_TO_PAY, "block"), ("off", 10**9, "off"), ("full", 1, "full")
    ):  # fmt: skip
        assert compile_model(tiny, mode, steps) == chosen
        assert f"torch.compile: {chosen}" in caplog.messages[-1]


def test_without_a_compiler_it_warns_and_runs_eager(tiny, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compile_model(tiny, "block", steps=1) == "off"
    assert "no C++ compiler" in caplog.text
    assert tiny(*batch(0)[:2]).loss.isfinite()
    with pytest.raises(ValueError, match="auto, block, full, off"):
        compile_model(tiny, "always", steps=1)


@pytest.mark.skipif(not has_cpp_compiler(), reason="nothing is compiled without a C++ compiler")
def test_blocks_whose_class_a_strategy_replaced_are_compiled_too(small):
    block, linear = blocks_of(small)[0], torch.nn.Linear(2, 2)
    block.__class__ = type("FSDPBlock", (Block,), {})  # as `fully_shard` does
    compile_kinds([block, linear], (Block,), "block", torch.device("cpu"), 1)
    assert block.compiled_compute is not None
    assert not hasattr(linear, "compiled_compute")
