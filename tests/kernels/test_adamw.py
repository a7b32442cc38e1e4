"""AdamW and the norm of many tensors against float64; halves of float32: exact, the upper one the nearest bfloat16."""

import pytest
import torch
from asserts import assert_equal, assert_refuses, relative
from support import DEVICE, guarded

from benchmarks import kernel_reference as reference
from fastmum.kernels import total_norm
from fastmum.kernels.adamw import Halves, Update, adamw_, join, join_bits, split_bits
from fastmum.kernels.dispatch import jit, launch, tl
from fastmum.kernels.total_norm import CHUNK, Norm

INFINITY, SIGN = 0x7F800000, -(1 << 31)  # bits
SHAPES = [(1,), (37, 5), (2, 3, 4, 4), (CHUNK + 3,), (7,)]
STEP = 3
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.05, "eps": 1e-8}


def state(grad_dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Float32 weights, gradients and both moments; the third tensor is channels-last."""
    made = [[torch.randn(shape, device=DEVICE) for shape in SHAPES] for _ in range(4)]
    for tensors in made:
        tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    weights, grads, exp_avgs, exp_avg_sqs = made
    return [weights, [x.to(grad_dtype) for x in grads], exp_avgs, [0.1 + x.abs() for x in exp_avg_sqs]]


def halved(lists: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """The weights as halves, and the rests in the fifth place."""
    halves = [Halves.of(x) for x in lists[0]]
    return [[x.parameter for x in halves], *([x.clone() for x in some] for some in lists[1:]), [x.rest for x in halves]]


def update(lists: list[list[torch.Tensor]], found_inf: float | None = None) -> list[torch.Tensor]:
    """One step in place; returns the joined weights."""
    weights, grads, exp_avgs, exp_avg_sqs, *rests = lists
    rests, step = rests[0] if rests else [], torch.tensor(float(STEP), device=DEVICE)
    found = None if found_inf is None else torch.tensor(found_inf, device=DEVICE)
    adamw_(weights, grads, exp_avgs, exp_avg_sqs, rests, step, **SETTINGS, found_inf=found)
    assert step == STEP
    return [join(*halves) for halves in zip(weights, rests, strict=True)] if rests else weights


@pytest.mark.parametrize(("grad_dtype", "found_inf"), [(torch.bfloat16, None), (torch.float32, 0.0)])
def test_a_step(backend, grad_dtype, found_inf):
    """Of whole weights, and of halves in memory without alignment: the same bits; neighbours do not change."""
    whole, memories = state(grad_dtype), []
    halves = halved(whole)
    for i, tensors in enumerate(halves):
        for j, x in enumerate(tensors):
            memories.append(torch.ones(x.numel() + 2, dtype=x.dtype, device=DEVICE))
            halves[i][j] = memories[-1].as_strided(x.shape, x.stride(), 1).copy_(x)
    truth = [
        reference.adamw(*(x.double() for x in of_one), step=STEP, **SETTINGS) for of_one in zip(*whole, strict=True)
    ]
    masters = update(halves, found_inf)
    assert_equal(masters, update(whole, found_inf))
    assert [x.stride() for x in masters] == [x.stride() for x in whole[0]]
    assert_equal([x for some in halves[2:4] for x in some], [x for some in whole[2:] for x in some])
    assert_equal(halves[0], [reference.nearest_bfloat16(x) for x in masters])
    assert all(memory[0] == memory[-1] == 1 for memory in memories)
    for found, true in zip(zip(masters, *whole[2:], strict=True), truth, strict=True):
        assert all(relative(a, b) < 1e-6 for a, b in zip(found, true, strict=True))


def test_kept_tables(backend):
    """Update and norm are those of single calls, wherever the gradients are, and after a change of their number."""
    single = [some[:3] for some in halved(state(torch.bfloat16))]
    weights, _, *moments, rests = kept = [[x.clone() for x in some] for some in single]
    updates, norm, step = Update(weights, *moments, rests), Norm(), torch.tensor(float(STEP), device=DEVICE)
    memory = torch.zeros(512, dtype=torch.bfloat16, device=DEVICE)
    for start in (0, 16, 17):  # the last one without alignment
        offset = start
        for i, grad in enumerate(single[1]):
            place = memory.as_strided(grad.shape, grad.stride(), offset)
            single[1][i] = place.copy_(torch.randn(grad.shape, device=DEVICE))
            offset += -(-grad.numel() // 16) * 16
        update(single)
        updates(single[1], step, **SETTINGS)
        assert_equal([x for i in (0, 2, 3, 4) for x in kept[i]], [x for i in (0, 2, 3, 4) for x in single[i]])
        assert torch.equal(norm(single[1]), total_norm(single[1]))
    assert torch.equal(norm(single[1][:2]), total_norm(single[1][:2]))
    with pytest.raises(ValueError, match="grads"):
        updates([x.flatten() for x in single[1]], step, **SETTINGS)


def test_gradients_that_are_not_finite(backend):
    """With `found_inf` they change nothing, without it the weight is NaN."""
    lists = halved(state(torch.bfloat16))
    lists[1][1].fill_(float("nan"))
    before = [x.clone() for some in (*lists[:1], *lists[2:]) for x in some]
    update(lists, 1.0)
    assert_equal([x for some in (*lists[:1], *lists[2:]) for x in some], before)
    masters = update(lists)
    assert lists[0][1].isnan().all()
    assert masters[1].isnan().all()


def test_refuses():
    zeros = [torch.zeros(3), torch.zeros(4, 2)]
    halves, shorts = [x.bfloat16() for x in zeros], [x.short() for x in zeros]
    args = dict.fromkeys(("weights", "grads", "exp_avgs", "exp_avg_sqs"), zeros)
    args |= {"rests": [], "step": torch.ones(())} | SETTINGS
    assert_refuses(adamw_, args, ValueError, grads=zeros[:1], exp_avgs=[zeros[0], torch.zeros(2, 4).t()])
    assert_refuses(adamw_, args, TypeError, grads=[zeros[0], halves[1]], exp_avgs=[x.double() for x in zeros])
    assert_refuses(adamw_, args, TypeError, weights=halves)
    assert_refuses(adamw_, args | {"rests": shorts}, TypeError, weights=zeros)
    args["weights"] = halves
    assert_refuses(adamw_, args, TypeError, rests=halves)
    assert_refuses(adamw_, args, ValueError, rests=[shorts[0][:2], shorts[1]])
    adamw_([], [], [], [], [], torch.ones(()), **SETTINGS)  # nothing to do
    assert_refuses(total_norm, {"tensors": []}, TypeError, tensors=[torch.ones(2, dtype=torch.int64)])
    assert_refuses(total_norm, {}, ValueError, tensors=[torch.ones(2), torch.ones(2, device="meta")])
    assert total_norm([]) == 0


@jit()
def _halves_kernel(master_ptr, high_ptr, rest_ptr, joined_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    high, rest = split_bits(tl.load(master_ptr + at, mask=at < N, other=0.0))
    tl.store(high_ptr + at, high, mask=at < N)
    tl.store(rest_ptr + at, rest, mask=at < N)
    tl.store(joined_ptr + at, join_bits(high, rest), mask=at < N)


@pytest.mark.parametrize("kernel", [False, True])
def test_halves_of_any_bits(kernel):
    """Every value that 16 bits hold, those halfway to the next, and their neighbours; infinite, subnormal and NaN."""
    lower = torch.tensor([0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xEDCB, 0xFFFE, 0xFFFF])
    bits = ((torch.arange(1 << 16)[:, None] << 16) + lower).flatten() + SIGN
    if kernel:  # NaN as arithmetic makes them
        bits = bits[(bits & 0x7FFFFFFF <= INFINITY) | (bits & 0x400000 > 0)]
    master = bits.to(DEVICE, torch.int32).view(torch.float32)
    halves = Halves.of(master)
    parameter, rest, joined = *halves, halves.join()
    assert (halves.shape, halves.dtype, halves.nbytes) == (master.shape, master.dtype, master.nbytes)
    number, finite = ~master.isnan(), master.isfinite()
    if kernel:
        pytest.importorskip("triton")
        plain, (parameter, rest, joined) = (parameter, rest), map(torch.empty_like, (parameter, rest, joined))
        args = master, parameter.view(torch.int16), rest, joined, len(master)
        launch(_halves_kernel, (-(-len(master) // 65536),), *args, BLOCK=65536, num_warps=4)
        assert_equal([parameter[number], rest[number]], [x[number] for x in plain])
    assert torch.equal(master.view(torch.int32).long().cpu(), bits), "the master stays"
    assert torch.equal(joined.view(torch.int32)[number], master.view(torch.int32)[number])
    assert joined[~number].isnan().all()
    assert parameter[~number].isnan().all()
    nearest = reference.nearest_bfloat16(master[finite].double())  # whose least unit float32 would flush
    assert torch.equal(parameter.view(torch.int16)[finite], nearest.view(torch.int16))
    assert torch.equal(parameter[number & ~finite], master[number & ~finite].bfloat16())


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.float16, torch.float32]])
def test_the_norm_of_all(backend, dtypes):
    shapes = [*SHAPES, (0,), (), (2, CHUNK)]
    some = [guarded(torch.randn(x, device=DEVICE).to(dtypes[i % len(dtypes)])) for i, x in enumerate(shapes)]
    bound = max(torch.finfo(x.dtype).eps for x in some) if backend == "torch" and DEVICE == "cpu" else 0
    norm = total_norm(some)
    assert norm.dtype == torch.float32
    assert relative(norm, sum(x.double().square().sum() for x in some).sqrt()) <= max(bound, 1e-5)
    for bad in (float("inf"), float("nan")):
        some[-1][0, 7] = bad
        assert not total_norm(some).isfinite()


def test_any_layout_without_gaps_or_alignment(backend):
    x = torch.randn(3, 5, 4, 4, device=DEVICE)
    unaligned = torch.zeros(1 + x.numel(), device=DEVICE)[1:].view_as(x).copy_(x)
    views = [x.to(memory_format=torch.channels_last), x.transpose(0, 1), unaligned]
    assert relative(total_norm(views), x.norm() * 3**0.5) < 1e-6
