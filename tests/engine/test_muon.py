"""Muon: a step against one by hand, shared work, skipped steps."""

import copy

import pytest
import torch
from torch import nn

from fastmum.config.schema import ConfigError, OptimSection
from fastmum.engine.muon import COEFFICIENTS, MOMENTUM, _Replicated, _Unit
from fastmum.engine.optimizer import Weight, build_optimizer
from fastmum.engine.task import ParamGroup, matrices_of
from fastmum.model.compile import blocks_of
from fastmum.tasks.pose.model import CrossAttention

OPTIM = OptimSection(optimizer="muon", muon_lr_scale=3.0, weight_decay=0.1)


def polar_factor(matrix, coefficients):
    """By the polynomials on the singular values."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    S = S / (S.norm() * 1.01)
    for a, b, c in coefficients:
        S = a * S + b * S**3 + c * S**5
    return U * S @ Vh


@pytest.mark.parametrize("orthogonalize", COEFFICIENTS)
def test_steps_by_hand(tiny, orthogonalize):
    plain, matrices = copy.deepcopy(tiny), matrices_of(blocks_of(tiny))
    optim = OptimSection(**vars(OPTIM) | {"orthogonalize": orthogonalize})
    assert sorted(matrices.values()) == [1] * 3 * len(blocks_of(tiny)) + [3] * len(blocks_of(tiny))
    named = dict(tiny.named_parameters())
    slow = [p for name, p in named.items() if name.startswith("decoder")]  # half the rate, no decay
    fast = [p for name, p in named.items() if not name.startswith("decoder")]
    groups = [ParamGroup(fast, weight_decay=0.1), ParamGroup(slow, "slow", lr_scale=0.5)]
    ours = build_optimizer(tiny, optim, groups=groups, matrices=matrices)
    parts = {name: matrices.get(p, 0) for name, p in tiny.named_parameters()}
    is_slow = {name: name.startswith("decoder") for name in named}
    others = [
        {"params": [p], "lr": 0.005 if is_slow[name] else 0.01,
         "weight_decay": 0.0 if is_slow[name] or p.ndim < 2 else 0.1}
        for name, p in plain.named_parameters() if not parts[name]
    ]  # fmt: skip
    adamw = torch.optim.AdamW(others, betas=tuple(optim.betas))
    momenta = {name: 0.0 for name, n in parts.items() if n}
    for _ in range(3):
        for (name, p), q in zip(tiny.named_parameters(), plain.parameters(), strict=True):
            p.grad = q.grad = torch.randn_like(p) * 1e-3
            if n := parts[name]:
                momenta[name] = MOMENTUM * momenta[name] + (1 - MOMENTUM) * q.grad
                update = MOMENTUM * momenta[name] + (1 - MOMENTUM) * q.grad
                update = torch.cat([polar_factor(part, COEFFICIENTS[orthogonalize]) for part in update.chunk(n)])
                scale = 0.2 * max(len(q) / n, q.shape[1]) ** 0.5
                with torch.no_grad():
                    q -= 0.015 * scale * update if is_slow[name] else 0.03 * (0.1 * q + scale * update)
        ours.step(0.01)
        adamw.step()
    for (name, p), q in zip(tiny.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
    averages = {name for name in ours.state() if name.startswith("exp_avg_sq.")}
    assert averages == {f"exp_avg_sq.{name}" for name, n in parts.items() if not n}


def test_skipped_steps_change_nothing_and_bfloat16_is_close(tiny):
    whole = copy.deepcopy(tiny)
    halves, floats = (
        build_optimizer(model, OPTIM, dtype, matrices=matrices_of(blocks_of(model)))
        for model, dtype in ((tiny, torch.bfloat16), (whole, torch.float32))
    )
    before = {w.name: w.master.clone() for w in halves.weights}
    for bad in (0.0, 1.0):
        for w, v in zip(halves.weights, floats.weights, strict=True):
            v.parameter.grad = torch.randn_like(v.parameter) * (float("nan") if bad else 1e-3)
            w.parameter.grad = v.parameter.grad.to(w.parameter.dtype)
        state = {name: (x.join() if hasattr(x, "join") else x.clone()) for name, x in halves.state().items()}
        for optimizer in (halves, floats):
            optimizer.step(1e-3, found_inf=torch.tensor(bad))
    for name, x in halves.state().items():
        torch.testing.assert_close(x.join() if hasattr(x, "join") else x, state[name], rtol=0, atol=0)
    for w, v in zip(halves.weights, floats.weights, strict=True):
        moved, expected = w.master - before[w.name], v.master - before[w.name]
        if w.matrices:
            assert (moved - expected).norm() < 0.1 * expected.norm(), w.name


def test_fused_projections_are_several_matrices():
    attention = CrossAttention(8, 2)
    assert matrices_of([attention]) == {attention.q.weight: 1, attention.kv.weight: 2, attention.proj.weight: 1}


def test_work_is_shared_by_cost():
    shapes = [(3, 96, 32), (1, 32, 32), (1, 128, 32), (1, 32, 128)] * 6
    weights = [
        Weight(f"w{i}", nn.Parameter(torch.empty(rows, columns)), None, matrices=n)
        for i, (n, rows, columns) in enumerate(shapes)
    ]
    units = [_Unit(w, i) for w in weights for i in range(w.matrices)]
    share = _Replicated(units, torch.float32, (), rank=0, size=5, group=None)
    assert max(share.loads) <= 1.05 * sum(share.loads) / 5
    assert sorted(share.owners) == sorted(units)
    # Of five steps: 15 r r c + 5 r^3 operations if r = c, 9 r r c + 17 r^3 if c = 4 r.
    assert sum(share.loads) == 6 * 32**3 * (3 * 20 + 20 + 53 + 53)


@pytest.mark.parametrize("matrices", [{}, {"weight": 3}, {"bias": 1}])
def test_what_is_no_matrix_is_refused(matrices):
    layer = nn.Linear(4, 5)
    with pytest.raises(ConfigError, match=r"optim\.optimizer"):
        build_optimizer(layer, OPTIM, matrices={layer.get_parameter(name): n for name, n in matrices.items()})
