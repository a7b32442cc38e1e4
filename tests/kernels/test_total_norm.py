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


def test_refuses():
    assert total_norm([]) == 0
    with pytest.raises(TypeError, match=r"tensors\[1\]"):
        total_norm([torch.ones(2), torch.ones(2, dtype=torch.int64)])
