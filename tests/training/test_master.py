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
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + seed)
        losses = [loss_of(model, seed) for model in (tiny, plain)]
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, (ours, theirs), strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in tiny.parameters())
    torch.testing.assert_close(ours.weights.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_matrices_and_their_biases_are_copies_and_the_rest_stays(tiny):
    weights = MasterWeights(tiny, torch.bfloat16)
    for name, parameter, master in weights.named():
        is_copy = "token" not in name and "norm" not in name
        assert parameter.dtype == (torch.bfloat16 if is_copy else torch.float32), name
        assert (master is not None) == is_copy, name
    assert all(value.dtype == torch.float32 for value in weights.state_dict().values())


def test_a_state_comes_back_whole(tiny):
    before = copy.deepcopy(tiny.state_dict())
    weights = MasterWeights(tiny, torch.bfloat16)
    state = copy.deepcopy(weights.state_dict())
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    with torch.no_grad():
        for _, parameter, master in weights.named():
            (parameter if master is None else master).zero_()
    weights.load_state_dict(state)
    torch.testing.assert_close(weights.state_dict(), before, rtol=0, atol=0)
    name, parameter, master = next(entry for entry in weights.named() if entry[2] is not None)
    assert torch.equal(parameter, master.bfloat16()), name


def test_in_float32_nothing_is_copied(tiny):
    assert all(master is None for _, _, master in MasterWeights(tiny, torch.float32).named())


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
    assert all((value == 1).all() for value in weights.state_dict().values())
