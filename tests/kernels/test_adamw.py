"""AdamW in one launch against float64, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from support import DEVICE, relative

from fastmum.kernels import reference
from fastmum.kernels.adamw import adamw_
from fastmum.kernels.tables import CHUNK

SHAPES = [(1,), (37, 5), (2, 3, 4, 4), (CHUNK + 3,), (7,)]
STEP = 3
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.05, "eps": 1e-8}


class Weights:
    """Masters with everything that belongs to them; the fourth axis of the third lies outermost in memory."""

    def __init__(self, grad_dtype: torch.dtype, copy_dtype: torch.dtype | None) -> None:
        def filled(make) -> list[torch.Tensor]:
            made = [make(shape, device=DEVICE) for shape in SHAPES]
            made[2] = made[2].to(memory_format=torch.channels_last)
            return made

        self.masters = filled(torch.randn)
        self.grads = [x.to(grad_dtype) for x in filled(torch.randn)]
        self.exp_avgs, self.exp_avg_sqs = filled(torch.randn), [0.1 + x for x in filled(torch.rand)]
        self.copies = [] if copy_dtype is None else [x.to(copy_dtype) for x in self.masters]
        self.step = torch.tensor(float(STEP), device=DEVICE)

    def update(self, found_inf: torch.Tensor | None = None) -> None:
        lists = self.masters, self.grads, self.exp_avgs, self.exp_avg_sqs, self.copies
        adamw_(*lists, self.step, **SETTINGS, found_inf=found_inf)

    def all(self) -> list[torch.Tensor]:
        return [*self.masters, *self.exp_avgs, *self.exp_avg_sqs, *self.copies, self.step]


@pytest.mark.parametrize("skips", [None, False])
@pytest.mark.parametrize(
    ("grad_dtype", "copy_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, None), (torch.float32, torch.bfloat16)],
)
def test_a_step(backend: str, grad_dtype: torch.dtype, copy_dtype: torch.dtype | None, skips: bool | None) -> None:
    weights = Weights(grad_dtype, copy_dtype)
    truth = [
        reference.adamw(*(x.double() for x in state), step=STEP, **SETTINGS)
        for state in zip(weights.masters, weights.grads, weights.exp_avgs, weights.exp_avg_sqs, strict=True)
    ]
    weights.update(None if skips is None else torch.zeros((), device=DEVICE))
    for i, (master, exp_avg, exp_avg_sq) in enumerate(truth):
        assert relative(weights.masters[i], master) < 1e-6
        assert relative(weights.exp_avgs[i], exp_avg) < 1e-6
        assert relative(weights.exp_avg_sqs[i], exp_avg_sq) < 1e-6
    assert weights.step == STEP
    for copy, master in zip(weights.copies, weights.masters, strict=False):
        assert torch.equal(copy, master.to(copy_dtype))


def test_an_infinite_gradient_changes_nothing(backend: str) -> None:
    weights = Weights(torch.bfloat16, torch.bfloat16)
    weights.grads[1].fill_(float("inf"))
    before = [x.clone() for x in weights.all()]
    weights.update(torch.ones((), device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(weights.all(), before, strict=True))


def test_tensors_that_are_not_aligned(backend: str) -> None:
    expected = Weights(torch.bfloat16, torch.bfloat16)
    weights = Weights(torch.bfloat16, torch.bfloat16)
    for name in ("masters", "grads", "exp_avgs", "exp_avg_sqs", "copies"):
        moved = []
        for x in getattr(expected, name):
            memory = torch.zeros(x.numel() + 1, dtype=x.dtype, device=DEVICE)
            moved.append(memory[1:].as_strided(x.shape, x.stride(), 1).copy_(x))
        setattr(weights, name, moved)
    for each in (expected, weights):
        each.update()
    assert all(torch.equal(a, b) for a, b in zip(weights.all(), expected.all(), strict=True))


def test_neighbours_in_memory_stay(backend: str) -> None:
    memory = torch.ones(20, device=DEVICE)
    master = memory[4:11]
    zeros = [torch.zeros(7, device=DEVICE) for _ in range(2)]
    adamw_(
        [master],
        [torch.ones(7, device=DEVICE)],
        [zeros[0]],
        [zeros[1]],
        [],
        torch.ones((), device=DEVICE),
        **SETTINGS,
    )
    assert (master != 1).all()
    assert (memory[:4] == 1).all()
    assert (memory[11:] == 1).all()


def test_nothing_to_do(backend: str) -> None:
    adamw_([], [], [], [], [], torch.ones(()), **SETTINGS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": [torch.zeros(3)]}, ValueError, "grads has 1 tensors"),
        ({"grads": [torch.zeros(3), torch.zeros(4, 2).bfloat16()]}, TypeError, "must have one"),
        ({"exp_avgs": [torch.zeros(3), torch.zeros(2, 4).t()]}, ValueError, "strides"),
        ({"copies": [torch.zeros(2), torch.zeros(4, 2)]}, ValueError, r"copies has a tensor of shape \(2,\)"),
    ],
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    def zeros() -> list[torch.Tensor]:
        return [torch.zeros(3), torch.zeros(4, 2)]

    names = ("masters", "grads", "exp_avgs", "exp_avg_sqs")
    args = {name: zeros() for name in names} | {"copies": [], "step": torch.ones(())}
    with pytest.raises(error, match=message):
        adamw_(**args | change, **SETTINGS)
