"""AdamW with split weights against autocast; groups, frozen weights, EMA, schedules."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kernel_reference import nearest_bfloat16
from fastmum.config.schema import OptimSection
from fastmum.engine import optimizer as engine_optimizer
from fastmum.engine.checkpoint import Checkpoints, load_checkpoint, read_weights
from fastmum.engine.optimizer import (
    CAST_MODULES,
    Ema,
    Piece,
    build_optimizer,
    chunks,
    default_groups,
    learning_rate,
    split_weights,
)
from fastmum.engine.task import ParamGroup


@contextmanager
def ties_away_from_zero(model):
    """Round the weights that autocast will cast, ties away from zero; afterwards put the float32 weights back."""
    products = [m for m in model.modules() if isinstance(m, CAST_MODULES)]
    weights = {p: p.detach().clone() for m in products for p in m.parameters(recurse=False)}
    with torch.no_grad():
        for p in weights:
            p.copy_(nearest_bfloat16(p))
    yield
    with torch.no_grad():
        for p, weight in weights.items():
            p.copy_(weight)


def test_training_equals_autocast_bit_for_bit(tiny, monkeypatch):
    monkeypatch.setitem(engine_optimizer.CHUNK, "cpu", 1000)  # pieces that end within tensors
    plain = copy.deepcopy(tiny)
    settings = OptimSection()
    ours = build_optimizer(tiny, settings, torch.bfloat16)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in plain.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=tuple(settings.betas), eps=settings.eps, fused=True)
    for step in range(4):
        rate = 1e-2 / (1 + step)
        for group in theirs.param_groups:
            group["lr"] = rate
        frames, noise = torch.randn(4, 3, 32, 48), torch.rand(4, 6)
        with ties_away_from_zero(plain):
            with torch.autocast("cpu", torch.bfloat16):
                losses = [model(frames, [3, 1], 0.5, noise).loss for model in (tiny, plain)]
            assert torch.equal(*losses)
            for loss in losses:
                loss.backward()
        ours.step(rate)
        theirs.step()
        for model in (tiny, plain):
            model.zero_grad()
    assert_same_weights(ours.weights, dict(plain.named_parameters()))
    for weight, p in zip(ours.weights, plain.parameters(), strict=True):
        state = theirs.state[p]
        assert ours.steps == state["step"]
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        torch.testing.assert_close(list(ours.moments[weight.name]), moments, rtol=0, atol=0)


def halves_of(model, dtype=torch.bfloat16):
    return split_weights(model, default_groups(model, OptimSection()), dtype)


def assert_same_weights(weights, state):
    assert {w.name for w in weights} == state.keys()
    for weight in weights:
        torch.testing.assert_close(weight.master, state[weight.name], rtol=0, atol=0)


def test_matrices_and_their_biases_are_split_without_loss(tiny):
    before = copy.deepcopy(dict(tiny.named_parameters()))
    weights = halves_of(tiny)
    assert_same_weights(weights, before)
    assert sum(weight.stored.nbytes for weight in weights) == 4 * sum(p.numel() for p in before.values())
    for weight in weights:
        is_split = "token" not in weight.name and "norm" not in weight.name
        assert (weight.rest is not None) == is_split, weight.name
        assert weight.parameter.dtype == (torch.bfloat16 if is_split else torch.float32), weight.name
        if is_split:
            assert torch.equal(weight.parameter, nearest_bfloat16(before[weight.name]))
    for weight in halves_of(copy.deepcopy(tiny).float(), torch.float32):
        assert weight.rest is None
        assert weight.stored.data_ptr() == weight.parameter.data_ptr()
    # What is loaded into the model reaches the masters.
    tiny.load_state_dict({name: torch.ones_like(value) for name, value in tiny.state_dict().items()})
    assert all((weight.master == 1).all() for weight in weights)
    assert not any(weight.rest.any() for weight in weights if weight.rest is not None)


def test_matrices_of_exact_modules_stay_whole_and_vectors_decay_if_asked(tiny):
    groups = default_groups(tiny, OptimSection(weight_decay=0.1))
    groups[0].decay_vectors = True
    weights = split_weights(tiny, groups, torch.bfloat16, [tiny.blocks[0].mlp])
    assert {w.weight_decay for w in weights} == {0.1}
    inside = [w for w in weights if w.name.startswith("blocks.0.mlp.")]
    assert {w.parameter.dtype for w in inside} == {torch.float32}
    assert {w.rest for w in inside} == {None}
    assert tiny.blocks[0].attn.qkv.weight.dtype == torch.bfloat16


def set_gradients(optimizer, make=torch.randn_like):
    for weight in optimizer.weights:
        weight.parameter.grad = make(weight.parameter)


@pytest.mark.parametrize("dtypes", [[torch.bfloat16, torch.float32], [torch.float32, torch.bfloat16]])
def test_a_checkpoint_moves_between_split_and_whole_weights(tiny, tmp_path, dtypes):
    """It holds the weights as they were when it was begun, while training continues."""
    saved, loaded = (build_optimizer(copy.deepcopy(tiny), OptimSection(), dtype) for dtype in dtypes)
    set_gradients(saved)
    saved.step(1e-2)
    before, moments = {w.name: w.master.clone() for w in saved.weights}, copy.deepcopy(saved.moments)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.prepare(saved.state())
    checkpoints.save(1, saved.state(), {"model_config": {}})
    set_gradients(saved)
    checkpoints.before_update()
    saved.step(1e-2)
    checkpoints.close()
    assert not any(torch.equal(w.master, before[w.name]) for w in saved.weights)
    parameters = [w.parameter for w in loaded.weights]
    load_checkpoint(tmp_path, loaded.state(), {})
    assert_same_weights(loaded.weights, before)
    assert all(w.parameter is p for w, p in zip(loaded.weights, parameters, strict=True))
    torch.testing.assert_close(loaded.moments, moments, rtol=0, atol=0)
    torch.testing.assert_close(read_weights(tmp_path).tensors, before, rtol=0, atol=0)  # float32 too


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), limit=st.integers(1, 50))
def test_chunks_hold_every_element_once(sizes, limit):
    tensors = [torch.zeros(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine_optimizer.CHUNK, "cpu", limit)
        bundles = list(chunks(enumerate(tensors)))
    for bundle in bundles:
        for piece in bundle:
            piece.of(piece.tensor).add_(1)
    assert all((tensor == 1).all() for tensor in tensors)
    counts = [sum(piece.stop - piece.start for piece in bundle) for bundle in bundles]
    assert set(counts[:-1]) <= {limit}
    assert 0 < counts[-1] <= limit
    with pytest.raises(RuntimeError, match="strides"):  # a gradient in another layout
        Piece(0, torch.zeros(4, 6), 0, 12, False).of(torch.zeros(6, 4).t())


def test_schedules():
    optim = OptimSection(base_lr=1e-4, warmup_steps=10, min_lr=1e-6)
    rates = [learning_rate(step, 111, optim, 512) for step in range(111)]
    assert rates[0] == pytest.approx(2e-5)
    assert rates[9] == rates[10] == pytest.approx(2e-4), "the peak is base_lr * samples / 256"
    assert rates[60] == pytest.approx((2e-4 + 2e-6) / 2 + (2e-4 - 2e-6) / 2 * math.cos(math.pi * 50 / 101))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(111, 111, optim, 512) == pytest.approx(2e-6)
    # 64 GPUs of 96 frames: 2.4e-3 (the paper's run)
    assert learning_rate(25_000, 500_000, OptimSection(), 64 * 96) == pytest.approx(2.4e-3)
    assert learning_rate(0, 10, OptimSection(base_lr=1.0, warmup_steps=0), 256) == pytest.approx(1.0)
    vggt = OptimSection(base_lr=2e-4, lr_frames=0, warmup_steps=5, warmup_lr=1e-8, min_lr=1e-8)
    rates = [learning_rate(i, 100, vggt, 48) for i in (0, 4, 5, 100)]
    assert rates == pytest.approx([1e-8 + (2e-4 - 1e-8) / 5, 2e-4, 2e-4, 1e-8])
    step = OptimSection(base_lr=1.0, warmup_steps=2, schedule="step", milestones=[5, 8], gamma=0.1)
    assert [learning_rate(i, 10, step, 256) for i in (0, 2, 4, 5, 7, 8)] == pytest.approx([0.5, 1, 1, 0.1, 0.1, 0.01])
    wsd = OptimSection(base_lr=1.0, warmup_steps=2, schedule="wsd", decay_share=0.4, min_lr=0.2)
    assert [learning_rate(i, 10, wsd, 256) for i in (0, 1, 5, 6, 8, 10)] == pytest.approx([0.5, 1, 1, 1, 0.6, 0.2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_averages_the_float32_weights_and_is_applied_temporarily(tiny, dtype):
    optimizer = build_optimizer(tiny, OptimSection(), dtype)
    ema = Ema(optimizer.weights, 0.75)
    expected = {w.name: w.master.clone() for w in optimizer.weights}
    for _ in range(3):
        set_gradients(optimizer)
        optimizer.step(1e-2, found_inf=torch.zeros(()))
        ema.update(torch.zeros(()))
        for w in optimizer.weights:
            expected[w.name] = 0.75 * expected[w.name] + 0.25 * w.master
    torch.testing.assert_close(ema.state(), {f"ema.{name}": value for name, value in expected.items()})
    before = copy.deepcopy(optimizer.state() | ema.state())
    with ema.applied():
        for w in optimizer.weights:
            torch.testing.assert_close(w.parameter.float().detach(), expected[w.name], rtol=1e-2, atol=1e-6)
    # A skipped step changes nothing.
    set_gradients(optimizer, lambda p: torch.full_like(p, math.nan))
    optimizer.step(1e-2, found_inf=torch.ones(()))
    ema.update(torch.ones(()))
    torch.testing.assert_close(optimizer.state() | ema.state(), before, rtol=0, atol=0)
    assert optimizer.steps == 3


def test_frozen_weights_are_left_out(tiny):
    frozen = [*tiny.blocks[0].parameters(), tiny.mask_token]
    for p in frozen:
        p.requires_grad_(False)
    optimizer = build_optimizer(tiny, OptimSection(), torch.bfloat16)
    assert not {id(p) for p in frozen} & {id(w.parameter) for w in optimizer.weights}
    assert all(p.dtype == torch.float32 for p in frozen)
    assert len(optimizer.weights) == len(list(tiny.parameters())) - len(frozen)
    with pytest.raises(ValueError, match="mask_token"):
        build_optimizer(tiny, OptimSection(), groups=[ParamGroup(list(tiny.parameters()))])


def test_weights_may_move_between_steps(tiny):
    """A step updates the memory that a weight has then, whatever was prepared before."""
    moved = build_optimizer(tiny, OptimSection())
    still = build_optimizer(copy.deepcopy(tiny), OptimSection())
    set_gradients(moved)
    for ours, theirs in zip(moved.weights, still.weights, strict=True):
        theirs.parameter.grad = ours.parameter.grad
    for _ in range(2):
        moved.step(1e-2)
        still.step(1e-2)
        for weight in moved.weights:
            weight.parameter.data = weight.parameter.data.clone()
    for ours, theirs in zip(moved.weights, still.weights, strict=True):
        assert torch.equal(ours.parameter, theirs.parameter)
