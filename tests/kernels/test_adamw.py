"""AdamW in one launch against float64; float32 in two halves: exact, and the upper one the nearest bfloat16."""

import pytest
import torch
from asserts import assert_equal, assert_refuses, relative
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import DEVICE

from fastmum.kernels import reference
from fastmum.kernels.adamw import Halves, adamw_, join, join_bits, split_, split_bits
from fastmum.kernels.dispatch import jit, launch, tl
from fastmum.kernels.total_norm import CHUNK

INFINITY, SIGN = 0x7F800000, -(1 << 31)  # bits
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


def test_gradients_that_are_not_finite(backend):
    """With `found_inf` they change nothing, without it the weight is NaN."""
    weights = Weights(torch.bfloat16, True)
    weights.grads[1].fill_(float("nan"))
    before = [x.clone() for x in weights.all()]
    weights.update(torch.ones((), device=DEVICE))
    assert_equal(weights.all(), before)
    weights.update()
    assert weights.weights[1].isnan().all()
    assert weights.masters()[1].isnan().all()


def test_tensors_that_are_not_aligned(backend):
    """Their neighbours in memory do not change."""
    expected, weights, memories = Weights(torch.bfloat16, True), Weights(torch.bfloat16, True), []
    for name in ("weights", "grads", "exp_avgs", "exp_avg_sqs", "rests"):
        moved = []
        for x in getattr(expected, name):
            memories.append(torch.ones(x.numel() + 2, dtype=x.dtype, device=DEVICE))
            moved.append(memories[-1].as_strided(x.shape, x.stride(), 1).copy_(x))
        setattr(weights, name, moved)
    for each in (expected, weights):
        each.update()
    assert_equal(weights.all(), expected.all())
    assert all(memory[0] == memory[-1] == 1 for memory in memories)


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
    adamw_([], [], [], [], [], torch.ones(()), **SETTINGS)  # nothing to do


def floats(bits: list[int] | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).to(DEVICE)


def around_every_bfloat16() -> torch.Tensor:
    """Bits of every value that 16 bits hold, of those halfway to the next, and of their neighbours."""
    upper = torch.arange(1 << 16)[:, None] << 16
    lower = torch.tensor([0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xEDCB, 0xFFFE, 0xFFFF])
    return (upper + lower).flatten() + SIGN


def check_halves(master: torch.Tensor, parameter: torch.Tensor, rest: torch.Tensor, joined: torch.Tensor) -> None:
    number = ~master.isnan()
    assert torch.equal(joined.view(torch.int32)[number], master.view(torch.int32)[number])
    assert joined[~number].isnan().all()
    assert parameter[~number].isnan().all()
    finite = master.isfinite()
    nearest = reference.nearest_bfloat16(master[finite].double())  # whose least unit float32 would flush
    assert torch.equal(parameter.view(torch.int16)[finite], nearest.view(torch.int16))
    assert torch.equal(parameter[number & ~finite], master[number & ~finite].bfloat16())
    tie = rest == -32768
    even = master.to(torch.bfloat16)
    assert torch.equal(parameter[number & ~tie], even[number & ~tie]), "only ties differ from PyTorch"


@settings(deadline=None)
@given(st.lists(st.integers(SIGN, -SIGN - 1), min_size=1, max_size=50))
@example([0x00007FFF, 0x00008000, 0x00018000, 0x007FFFFF, 0x00000001])  # subnormal
@example([0x3FFF8000, 0x3FFFFFFF, 0x3F808000, 0x3F818000])  # into the next exponent; ties at even and odd
@example([0x7F7F8000, 0x7F7FFFFF, INFINITY, 0x7FC00000, 0x7FFFFFFF, 0x7F800001])  # the largest, infinite, NaN
@example([SIGN, SIGN | 0x7F7FFFFF, SIGN | INFINITY, -1, -32768, -32769])
@example(around_every_bfloat16())
def test_any_bits(bits):
    master = floats(bits)
    halves = Halves.of(master)
    check_halves(master, *halves, halves.join())
    assert torch.equal(master.view(torch.int32), floats(bits).view(torch.int32)), "the master stays"


def test_the_layout_stays():
    master = torch.randn(2, 3, 4, 4, device=DEVICE).to(memory_format=torch.channels_last)
    halves = Halves.of(master)
    assert halves.parameter.stride() == halves.rest.stride() == halves.join().stride() == master.stride()
    assert torch.equal(halves.join(), master)
    assert (halves.shape, halves.dtype, halves.nbytes) == (master.shape, master.dtype, master.nbytes)


@jit()
def _halves_kernel(master_ptr, high_ptr, rest_ptr, joined_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    high, rest = split_bits(tl.load(master_ptr + at, mask=at < N, other=0.0))
    tl.store(high_ptr + at, high, mask=at < N)
    tl.store(rest_ptr + at, rest, mask=at < N)
    tl.store(joined_ptr + at, join_bits(high, rest), mask=at < N)


def test_the_same_bits_in_triton(monkeypatch):
    pytest.importorskip("triton")
    quiet = around_every_bfloat16()
    quiet = quiet[(quiet & 0x7FFFFFFF <= INFINITY) | (quiet & 0x400000 > 0)]  # NaN as arithmetic makes them
    master = floats(quiet)
    high, rest = (torch.empty_like(master, dtype=torch.int16) for _ in range(2))
    joined = torch.empty_like(master)
    args = master, high, rest, joined, len(master)
    launch(_halves_kernel, (-(-len(master) // 65536),), *args, BLOCK=65536, num_warps=4)
    check_halves(master, high.view(torch.bfloat16), rest, joined)
    number = ~master.isnan()
    parameter, plain = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(rest)
    split_(master, parameter, plain)
    assert torch.equal(high[number], parameter.view(torch.int16)[number])
    assert torch.equal(rest[number], plain[number])
    assert torch.equal(join(parameter, plain)[number], joined[number])
