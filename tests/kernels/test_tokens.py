"""scatter_tokens and gather_tokens with their gradients against the float64 reference."""

from collections.abc import Callable

import pytest
import torch
from asserts import assert_close, assert_equal, assert_refuses, check, check_compiles
from support import DEVICE, DTYPES, double, guarded, pairs, results, split_ids, strided

from benchmarks import kernel_reference as reference
from fastmum.kernels import gather_tokens, scatter_tokens
from fastmum.kernels.tokens import _gather_tokens_triton, _place_triton

# Frames, patches, ids of a frame, width.
SIZES = [
    (1, 1, 1, 48),
    (1, 35, 1, 64),
    (3, 35, 34, 1),
    (2, 12, 5, 199),
    (2, 130, 70, 52),
    (2, 9, 3, 1024),
    (2, 5, 0, 64),
]


def problem(F: int, P: int, K: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    ids, _ = split_ids(F, P, K)
    visible, tokens = (torch.randn(F, n, D, device=DEVICE).to(dtype) for n in (1 + K, 1 + P))
    return guarded(visible), guarded(torch.randn(1, 1, D, device=DEVICE)), guarded(tokens), guarded(ids)


def scatters(ids: torch.Tensor, P: int) -> tuple[Callable, Callable]:
    """Ours, and the reference."""
    return (lambda v, m: scatter_tokens(v, m, ids, P)), lambda v, m: reference.scatter_tokens(v, m, ids, P)


@pytest.mark.parametrize(("size", "dtype"), pairs(SIZES, DTYPES))
def test_scatter_and_gather(backend, size, dtype):
    visible, mask_token, tokens, ids = problem(*size, dtype)
    check(*scatters(ids, size[1]), [visible, mask_token], tokens)
    both = (lambda x: gather_tokens(x, ids)), lambda x: reference.gather_tokens(x, ids)
    assert_equal(*(results(function, [tokens], visible[:, 1:]) for function in both))


def test_not_contiguous_and_int32_ids(backend):
    visible, mask_token, tokens, ids = problem(3, 10, 4, 64, torch.float32)
    apart = strided(ids.int())
    truth = reference.scatter_tokens(visible, mask_token, ids, 10)
    assert torch.equal(scatter_tokens(strided(visible), strided(mask_token), apart, 10), truth)
    assert torch.equal(gather_tokens(strided(tokens), apart), reference.gather_tokens(tokens, ids))
    expanded = torch.ones((), device=DEVICE).expand(3, 11, 64)
    assert_equal(*(results(function, [visible, mask_token], expanded) for function in scatters(ids, 10)))


def test_mask_gradient_is_exact_where_visible_gradients_are_huge(backend):
    """Summing all and subtracting the visible would lose the masked tokens' share."""
    visible, mask_token, tokens, ids = problem(2, 9, 3, 64, torch.float32)
    weight = scatter_tokens(torch.full_like(visible, 1e12), torch.ones_like(mask_token), ids, 9) * tokens
    ours, plain = scatters(ids, 9)
    true = results(plain, double([visible, mask_token]), weight.double())
    assert_close(results(ours, [visible, mask_token], weight)[2], true[2])


def test_ids_out_of_range_on_the_gpu():
    """Without the check of the CPU, nothing out of bounds is read or written."""
    pytest.importorskip("triton")
    ids = torch.tensor([[4, 0], [-1, 3]], device=DEVICE)
    out = _gather_tokens_triton(guarded(torch.ones(2, 5, 8, device=DEVICE)), ids)
    assert out.isnan().all(-1).tolist() == [[True, False], [True, False]]
    for _ in range(2):  # the second call repeats the first one's plan
        out = _place_triton(torch.ones(2, 3, 8, device=DEVICE), torch.zeros(8, device=DEVICE), ids, 4)
        assert out.sum(-1).tolist() == [[8, 8, 0, 0, 0], [8, 0, 0, 0, 8]]


def test_operators(backend):
    """Their schemas, fakes and gradients, and one graph."""
    visible, mask_token, tokens, ids = problem(2, 6, 2, 32, torch.float32)
    there_and_back = lambda v, m: gather_tokens(scatter_tokens(v, m, ids, 6), ids)  # noqa: E731
    check_compiles(there_and_back, [visible, mask_token], tokens[:, 1:3])
    ops = torch.ops.fastmum
    leaves = visible.clone().requires_grad_(), mask_token.flatten().requires_grad_()
    torch.library.opcheck(ops.scatter_tokens.default, (*leaves, ids, 6))
    torch.library.opcheck(ops.scatter_tokens_backward.default, (tokens, ids, torch.float32))
    torch.library.opcheck(ops.gather_tokens.default, (tokens.clone().requires_grad_(), ids))
    torch.library.opcheck(ops.gather_tokens_backward.default, (visible[:, 1:], ids, 6))


def test_refuses():
    args = {"visible": torch.zeros(2, 3, 8), "mask_token": torch.zeros(8), "num_patches": 5}
    args |= {"visible_ids": torch.tensor([[0, 1], [2, 3]])}
    changes = {"visible": torch.zeros(2, 4, 8), "mask_token": torch.zeros(7), "num_patches": 1}
    assert_refuses(scatter_tokens, args, ValueError, **changes)
    assert_refuses(scatter_tokens, args, ValueError, mask_token=torch.zeros(8, device="meta"))
    assert_refuses(scatter_tokens, args, TypeError, visible=torch.zeros(2, 3, 8, dtype=torch.int64))
    assert_refuses(scatter_tokens, args, IndexError, visible_ids=torch.tensor([[0, 1], [2, 5]]))
    args = {"tokens": torch.zeros(1, 5, 8), "ids": torch.tensor([[1]])}
    assert_refuses(gather_tokens, args, TypeError, tokens=torch.zeros(1, 5, 8, dtype=torch.int32))
    assert_refuses(gather_tokens, args, ValueError, ids=torch.tensor([[1], [2]]))
    assert_refuses(gather_tokens, args, IndexError, ids=torch.tensor([[4]]))
