"""bfloat16 matrices with float32 masters: the numbers of autocast, and float32 in every state."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum import MuM
from fastmum.config.schema import OptimSection
from fastmum.training import optim
from fastmum.training.master import MasterWeights
from fastmum.training.optim import build_optimizer


def loss_of(model: MuM, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    frames, noise = torch.randn(4, 3, 32, 48, generator=generator), torch.rand(4, 6, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        return model(frames, [3, 1], 0.5, noise).loss


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
        torch.testing.assert_close(weight.master.detach(), state[weight.name], rtol=0, atol=0)


def test_matrices_and_their_biases_are_copies_and_the_rest_stays(tiny):
    weights = MasterWeights(tiny, torch.bfloat16)
    for weight in weights.weights:
        is_copy = "token" not in weight.name and "norm" not in weight.name
        assert weight.parameter.dtype == (torch.bfloat16 if is_copy else torch.float32), weight.name
        assert weight.is_copied == is_copy, weight.name
        assert weight.master.dtype == torch.float32, weight.name


def test_a_state_comes_back_whole(tiny):
    before = copy.deepcopy(tiny.state_dict())
    weights = MasterWeights(tiny, torch.bfloat16)
    assert_same_weights(weights, before)
    with torch.no_grad():
        for weight in weights.weights:
            weight.master.zero_()
            weight.master.copy_(before[weight.name])
    weights.renew_copies()
    assert_same_weights(weights, before)
    assert all(torch.equal(w.parameter, w.master.to(w.parameter.dtype)) for w in weights.weights)


def test_in_float32_nothing_is_copied(tiny):
    assert not any(weight.is_copied for weight in MasterWeights(tiny, torch.float32).weights)


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
