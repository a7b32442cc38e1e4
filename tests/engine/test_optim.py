import copy
import math

import pytest
import torch

from fastmum import PRESETS, MuM
from fastmum.config.schema import OptimSection
from fastmum.engine.optimizer import build_optimizer
from fastmum.engine.schedule import learning_rate


def test_warm_up_then_half_a_cosine():
    optim = OptimSection(base_lr=1e-4, warmup_steps=10)
    rates = [learning_rate(step, 110, optim, frames_per_step=512) for step in range(110)]
    assert rates[0] == pytest.approx(2e-5)
    assert rates[9] == pytest.approx(2e-4), "the peak is base_lr * frames / 256"
    assert rates[10] == pytest.approx(2e-4)
    assert rates[60] == pytest.approx(1e-4)
    assert rates[109] == pytest.approx(1e-4 * (1 + math.cos(math.pi * 0.99)))
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_paper_peak():
    # 64 GPUs of 96 frames: 2.4e-3 (facts of the paper's run)
    assert learning_rate(25_000, 500_000, OptimSection(), 64 * 96) == pytest.approx(2.4e-3)


def test_no_warm_up():
    assert learning_rate(0, 10, OptimSection(base_lr=1.0, warmup_steps=0), 256) == pytest.approx(1.0)


def test_decay_of_matrices_only(tiny):
    optimizer = build_optimizer(tiny, OptimSection())
    assert len(optimizer.weights) == len(list(tiny.parameters()))
    assert all(optimizer.decay(w) == (0.05 if w.parameter.ndim > 1 else 0) for w in optimizer.weights)


def test_one_step_by_hand():
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, OptimSection(eps=0.0))
    layer.weight.grad, layer.bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step(0.1)
    # The first step of Adam is the sign of the gradient.
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.05) - 0.1)


def test_a_step_that_is_passed_over_changes_nothing(tiny):
    optimizer = build_optimizer(tiny, OptimSection(), torch.bfloat16)
    for weight in optimizer.weights:
        weight.parameter.grad = torch.ones_like(weight.parameter)
    optimizer.step(1e-3, found_inf=torch.zeros(()))
    before = copy.deepcopy(optimizer.state())
    for weight in optimizer.weights:
        weight.parameter.grad.fill_(math.nan)
    optimizer.step(1e-3, found_inf=torch.ones(()))
    torch.testing.assert_close(optimizer.state(), before, rtol=0, atol=0)
    assert optimizer.steps == 1


def test_one_batch_is_learnt_by_heart():
    torch.manual_seed(0)
    model = MuM(PRESETS["mum_tiny"])
    coarse = torch.rand(4, 3, 6, 6)
    frames = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic")
    noise = torch.rand(4, 16)
    optimizer = build_optimizer(model, OptimSection())
    losses = []
    for _ in range(100):
        loss = model(frames, [2, 2], 0.75, noise).loss
        loss.backward()
        optimizer.step(1e-3)
        model.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 0.95, "an untrained model knows no more than the patch mean"
    assert losses[-1] < 0.5
