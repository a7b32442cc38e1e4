"""AdamW in one launch against float64."""

from __future__ import annotations

import pytest
import torch
from asserts import assert_equal, assert_refuses, relative
from support import DEVICE

from fastmum.kernels import reference
from fastmum.kernels.adamw import Halves, adamw_, join
from fastmum.kernels.total_norm import CHUNK

SHAPES = [(1,), (37, 5), (2, 3, 4, 4), (CHUNK + 3,), (7,)]
STEP = 3
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.05, "eps": 1e-8}


class Weights:
    """Weights with gradients, moments and rests; the third tensor is channels-last."""

    def __init__(self, grad_dtype: torch.dtype, split: bool) -> None:
        def filled(make) -> list[torch.Tensor]:
            made = [make(shape, device=DEVICE) for shape in SHAPES]
            made[2] = made[2].to(memory_format=torch.channels_last)
            return made

        self.weights, self.rests = filled(torch.randn), []
        if split:
            self.weights, self.rests = map(list, zip(*map(Halves.of, self.weights), strict=True))
        self.grads = [x.to(grad_dtype) for x in filled(torch.randn)]
        self.exp_avgs, self.exp_avg_sqs = filled(torch.randn), [0.1 + x for x in filled(torch.rand)]
        self.step = torch.tensor(float(STEP), device=DEVICE)

    def update(self, found_inf: torch.Tensor | None = None) -> None:
        lists = self.weights, self.grads, self.exp_avgs, self.exp_avg_sqs, self.rests
        adamw_(*lists, self.step, **SETTINGS, found_inf=found_inf)

    def all(self) -> list[torch.Tensor]:
        return [*self.weights, *self.exp_avgs, *self.exp_avg_sqs, *self.rests, self.step]

    def masters(self) -> list[torch.Tensor]:
        return [join(*halves) for halves in zip(self.weights, self.rests, strict=True)] if self.rests else self.weights


@pytest.mark.parametrize(
    ("grad_dtype", "split", "found_inf"),
    [(torch.bfloat16, True, None), (torch.float32, False, 0.0), (torch.float32, True, 0.0)],
)
def test_a_step(backend, grad_dtype, split, found_inf):
    weights = Weights(grad_dtype, split)
    truth = [
        reference.adamw(*(x.double() for x in state), step=STEP, **SETTINGS)
        for state in zip(weights.masters(), weights.grads, weights.exp_avgs, weights.exp_avg_sqs, strict=True)
    ]
    weights.update(None if found_inf is None else torch.tensor(found_inf, device=DEVICE))
    masters = weights.masters()
    for i, (master, exp_avg, exp_avg_sq) in enumerate(truth):
        assert relative(masters[i], master) < 1e-6
        assert relative(weights.exp_avgs[i], exp_avg) < 1e-6
        assert relative(weights.exp_avg_sqs[i], exp_avg_sq) < 1e-6
    assert weights.step == STEP
    if split:
        assert all(torch.equal(x, reference.nearest_bfloat16(y)) for x, y in zip(weights.weights, masters, strict=True))


def test_halves_and_whole_weights_learn_the_same_bit_for_bit(backend):
    whole, halves = Weights(torch.bfloat16, False), Weights(torch.bfloat16, True)
    halves.weights, halves.rests = map(list, zip(*map(Halves.of, whole.weights), strict=True))
    for name in ("grads", "exp_avgs", "exp_avg_sqs"):
        setattr(halves, name, [x.clone() for x in getattr(whole, name)])
    for weights in (whole, halves):
        weights.update()
    assert_equal(whole.masters(), halves.masters())


def test_a_weight_that_becomes_nan_is_seen(backend):
    weights = Weights(torch.float32, True)
    weights.grads[1].fill_(float("nan"))
    weights.update()
    assert weights.weights[1].isnan().all()
    assert weights.masters()[1].isnan().all()


def test_an_infinite_gradient_changes_nothing(backend):
    weights = Weights(torch.bfloat16, True)
    weights.grads[1].fill_(float("inf"))
    before = [x.clone() for x in weights.all()]
    weights.update(torch.ones((), device=DEVICE))
    assert_equal(weights.all(), before)


def test_tensors_that_are_not_aligned(backend):
    expected = Weights(torch.bfloat16, True)
    weights = Weights(torch.bfloat16, True)
    for name in ("weights", "grads", "exp_avgs", "exp_avg_sqs", "rests"):
        moved = []
        for x in getattr(expected, name):
            memory = torch.zeros(x.numel() + 1, dtype=x.dtype, device=DEVICE)
            moved.append(memory[1:].as_strided(x.shape, x.stride(), 1).copy_(x))
        setattr(weights, name, moved)
    for each in (expected, weights):
        each.update()
    assert_equal(weights.all(), expected.all())


def test_neighbours_in_memory_stay(backend):
    memory = torch.ones(20, device=DEVICE)
    weight = memory[4:11]
    zeros = [torch.zeros(7, device=DEVICE) for _ in range(2)]
    one = torch.ones((), device=DEVICE)
    adamw_([weight], [torch.ones(7, device=DEVICE)], zeros[:1], zeros[1:], [], one, **SETTINGS)
    assert (weight != 1).all()
    assert (memory[:4] == 1).all()
    assert (memory[11:] == 1).all()


def test_nothing_to_do(backend):
    adamw_([], [], [], [], [], torch.ones(()), **SETTINGS)


def test_refuses():
    zeros = [torch.zeros(3), torch.zeros(4, 2)]
    halves = [x.bfloat16() for x in zeros]
    shorts = [x.short() for x in zeros]
    args = dict.fromkeys(("weights", "grads", "exp_avgs", "exp_avg_sqs"), zeros)
    changes = [
        ({"grads": zeros[:1]}, ValueError, "grads has 1 tensors"),
        ({"grads": [zeros[0], halves[1]]}, TypeError, "grads has dtypes"),
        ({"exp_avgs": [zeros[0], torch.zeros(2, 4).t()]}, ValueError, "exp_avgs has a tensor .* strides"),
        ({"exp_avgs": [x.double() for x in zeros]}, TypeError, "exp_avgs has dtype torch.float64"),
        ({"rests": shorts}, TypeError, "weights has dtype torch.float32"),
        ({"weights": halves}, TypeError, "weights has dtype torch.bfloat16"),
        ({"weights": halves, "rests": halves}, TypeError, "rests has dtype torch.bfloat16"),
        ({"weights": halves, "rests": [shorts[0][:2], shorts[1]]}, ValueError, r"rests has a tensor of shape \(2,\)"),
    ]
    assert_refuses(adamw_, args | {"rests": [], "step": torch.ones(())} | SETTINGS, changes)
