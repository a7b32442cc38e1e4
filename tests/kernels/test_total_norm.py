"""The norm of many tensors at once against float64."""

import pytest
import torch
from asserts import relative
from support import DEVICE, guarded

from fastmum.kernels import total_norm
from fastmum.kernels.total_norm import CHUNK

SHAPES = [(1,), (37, 5), (0,), (CHUNK + 3,), (), (769,), (2, CHUNK)]


def tensors(dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    made = [torch.randn(shape, device=DEVICE).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(SHAPES)]
    return [guarded(x) for x in made]


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.float16, torch.float32]])
def test_the_norm_of_all(backend, dtypes):
    some = tensors(dtypes)
    truth = sum(x.double().square().sum() for x in some).sqrt()
    bound = 1e-5
    if backend == "torch" and DEVICE == "cpu":
        bound = max(bound, *(torch.finfo(x.dtype).eps for x in some))
    norm = total_norm(some)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert relative(norm, truth) <= bound


def test_any_layout_without_gaps_or_alignment(backend):
    x = torch.randn(3, 5, 4, 4, device=DEVICE)
    assert relative(total_norm([x.to(memory_format=torch.channels_last), x.transpose(0, 1)]), x.norm() * 2**0.5) < 1e-6
    x = torch.randn(1000, device=DEVICE).bfloat16()
    memory = torch.zeros(1001, dtype=torch.bfloat16, device=DEVICE)
    bound = 1e-6 if backend == "triton" else 1e-2
    assert relative(total_norm([memory[1:].copy_(x)]), x.double().norm()) < bound


def test_values_that_are_not_finite(backend):
    for bad in (float("inf"), float("nan")):
        some = tensors([torch.bfloat16, torch.float32])
        some[-1][0, 7] = bad
        assert not total_norm(some).isfinite()


def test_refuses():
    assert total_norm([]) == 0
    with pytest.raises(TypeError, match=r"tensors\[1\] has dtype torch.int64"):
        total_norm([torch.ones(2), torch.ones(2, dtype=torch.int64)])
