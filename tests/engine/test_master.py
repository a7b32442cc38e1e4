"""bfloat16 matrices with float32 masters in halves: the numbers of autocast, and float32 in every checkpoint."""

import copy
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum import MuM
from fastmum.config.schema import OptimSection
from fastmum.engine import optimizer as optim
from fastmum.engine.checkpoint import Checkpoints, load_checkpoint, read_weights
from fastmum.engine.master import PRODUCTS, MasterWeights
from fastmum.engine.optimizer import build_optimizer
from fastmum.kernels.reference import nearest_bfloat16


def loss_of(model: MuM, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    frames, noise = torch.randn(4, 3, 32, 48, generator=generator), torch.rand(4, 6, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        return model(frames, [3, 1], 0.5, noise).loss


@contextmanager
def ties_away_from_zero(model):
    """Round what autocast will cast beforehand, and put the float32 weights back: then ties do not go to even."""
    products = [m for m in model.modules() if isinstance(m, PRODUCTS)]
    weights = {p: p.detach().clone() for m in products for p in m.parameters(recurse=False)}
    with torch.no_grad():
        for p in weights:
            p.copy_(nearest_bfloat16(p))
    yield
    with torch.no_grad():
        for p, weight in weights.items():
            p.copy_(weight)


def test_training_is_that_of_autocast_bit_for_bit(tiny, monkeypatch):
    monkeypatch.setitem(optim.BUNDLE, "cpu", 1000)  # pieces that end within tensors
    plain = copy.deepcopy(tiny)
    settings = OptimSection()
    ours = build_optimizer(tiny, settings, torch.bfloat16)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in plain.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=tuple(settings.betas), eps=settings.eps, fused=True)
    for seed in range(4):
        rate = 1e-2 / (1 + seed)
        for group in theirs.param_groups:
            group["lr"] = rate
        with ties_away_from_zero(plain):
            losses = [loss_of(model, seed) for model in (tiny, plain)]
            assert torch.equal(*losses)
            for loss in losses:
                loss.backward()
        ours.step(rate)
        theirs.step()
        for model in (tiny, plain):
            model.zero_grad()
    assert_same_weights(ours.masters, plain.state_dict())
    for weight, p in zip(ours.weights, plain.parameters(), strict=True):
        state = theirs.state[p]
        assert ours.steps == state["step"]
        moments = dict(zip(("exp_avg", "exp_avg_sq"), ours.moments[weight.name], strict=True))
        torch.testing.assert_close(moments, {name: state[name] for name in moments}, rtol=0, atol=0)


def assert_same_weights(masters, state):
    assert {w.name for w in masters.weights} == state.keys() - {name for name, _ in masters.model.named_buffers()}
    for weight in masters.weights:
        torch.testing.assert_close(weight.master, state[weight.name], rtol=0, atol=0)


def test_matrices_and_their_biases_are_split_and_the_others_stay(tiny):
    weights = MasterWeights(tiny, torch.bfloat16)
    for weight in weights.weights:
        is_split = "token" not in weight.name and "norm" not in weight.name
        assert weight.parameter.dtype == (torch.bfloat16 if is_split else torch.float32), weight.name
        assert (weight.rest is not None) == is_split, weight.name
        assert weight.master.dtype == torch.float32, weight.name


def test_nothing_is_lost_or_kept_twice(tiny):
    before = copy.deepcopy(tiny.state_dict())
    weights = MasterWeights(tiny, torch.bfloat16)
    assert_same_weights(weights, before)
    parameters = sum(weight.parameter.numel() for weight in weights.weights)
    assert sum(weight.stored.nbytes for weight in weights.weights) == 4 * parameters
    for weight in weights.weights:
        if weight.rest is not None:
            assert torch.equal(weight.parameter, nearest_bfloat16(before[weight.name]))


@pytest.mark.parametrize("dtypes", [[torch.bfloat16, torch.float32], [torch.float32, torch.bfloat16]])
def test_checkpoints_move_between_split_and_whole_weights(tiny, tmp_path, dtypes):
    optimizers = [build_optimizer(copy.deepcopy(tiny), OptimSection(), dtype) for dtype in dtypes]
    saved, loaded = optimizers
    for weight in saved.weights:
        weight.parameter.grad = torch.randn_like(weight.parameter)
    saved.step(1e-2)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.prepare(saved.state())
    checkpoints.save(1, saved.state(), {"model_config": {}})
    checkpoints.close()
    parameters = [w.parameter for w in loaded.weights]
    load_checkpoint(tmp_path, loaded.state(), {})
    assert_same_weights(loaded.masters, {w.name: w.master for w in saved.weights})
    assert all(w.parameter is p for w, p in zip(loaded.weights, parameters, strict=True))
    torch.testing.assert_close(loaded.moments, saved.moments, rtol=0, atol=0)
    written = read_weights(tmp_path).tensors
    assert all(tensor.dtype == torch.float32 for tensor in written.values())
    assert_same_weights(saved.masters, written)


def test_a_checkpoint_holds_the_weights_as_they_were_while_training_goes_on(tiny, tmp_path):
    optimizer = build_optimizer(tiny, OptimSection(), torch.bfloat16)
    before = {w.name: w.master.clone() for w in optimizer.weights}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, optimizer.state(), {"model_config": {}})
    for weight in optimizer.weights:
        weight.parameter.grad = torch.ones_like(weight.parameter)
    checkpoints.before_update()
    optimizer.step(1e-2)
    checkpoints.close()
    written = read_weights(tmp_path).tensors
    torch.testing.assert_close(written, before, rtol=0, atol=0)
    assert not any(torch.equal(w.master, before[w.name]) for w in optimizer.weights)


def test_in_float32_nothing_is_split(tiny):
    weights = MasterWeights(tiny, torch.float32).weights
    assert all(weight.rest is None for weight in weights)
    assert all(weight.stored.data_ptr() == weight.parameter.data_ptr() for weight in weights)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), limit=st.integers(1, 50))
def test_bundles_hold_every_element_once(sizes, limit):
    tensors = [torch.zeros(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(optim.BUNDLE, "cpu", limit)
        bundles = list(optim._bundles(tensors))
    for bundle in bundles:
        for piece in bundle:
            piece.of(piece.tensor).add_(1)
    assert all((tensor == 1).all() for tensor in tensors)
    counts = [sum(piece.stop - piece.start for piece in bundle) for bundle in bundles]
    assert set(counts[:-1]) <= {limit}
    assert 0 < counts[-1] <= limit


def test_a_gradient_in_another_layout_is_refused():
    piece = optim.Piece(torch.zeros(4, 6), 0, 24)
    with pytest.raises(RuntimeError, match="strides"):
        piece.of(torch.zeros(6, 4).t())


def test_weights_loaded_into_the_model_reach_the_masters(tiny):
    weights = MasterWeights(tiny, torch.bfloat16)
    tiny.load_state_dict({name: torch.ones_like(value) for name, value in tiny.state_dict().items()})
    assert all((weight.master == 1).all() for weight in weights.weights)
    assert all(not weight.rest.any() for weight in weights.weights if weight.rest is not None)
