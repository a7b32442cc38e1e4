"""Assertions of the kernel tests."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from support import DEVICE, double, results
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def relative(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|, or |value| if the truth is 0."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    norm = truth.norm()
    return float((value - truth).norm() / (norm if norm > 0 else 1.0))


def assert_close(value: Tensor, truth: Tensor, plain: Tensor | None = None) -> None:
    """Within 1e-5 of the truth; in bfloat16 and float16 within 1.1 times the error of plain PyTorch in that dtype.

    The ratio of two errors of n values is known to about 1 / sqrt(n).
    """
    if value.dtype in (torch.float32, torch.float64):
        assert relative(value, truth) <= 1e-5
    else:
        assert plain is not None
        # A quarter of a rounding unit more: plain PyTorch may be exact by chance.
        bound = (1.1 + 5 / max(value.numel(), 1) ** 0.5) * relative(plain, truth)
        assert relative(value, truth) <= max(bound, torch.finfo(value.dtype).eps / 4)


def assert_equal(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def check(ours: Callable, plain: Callable, inputs: Sequence[Tensor], *weights: Tensor) -> list[Tensor]:
    """Compare outputs and gradients of `ours` with those of `plain` in float64; returns them."""
    found, usual = results(ours, inputs, *weights), results(plain, inputs, *weights)
    for value, true, of_plain in zip(found, results(plain, double(inputs), *weights), usual, strict=True):
        assert_close(value, true, of_plain)
    return found


def check_compiles(function: Callable, inputs: Sequence[Tensor], *weights: Tensor, autocast: bool = True) -> None:
    """Compiled in one graph, with and without autocast, outputs and gradients are those of eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = results(function, inputs, *weights)
    for enabled in {False, autocast}:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            assert_equal(results(compiled, inputs, *weights), eager)


def check_frozen(
    function: Callable, inputs: Sequence[Tensor], weights: Sequence[Tensor], needed: Sequence[int],
    unsaved: Sequence[int], operations: int,
) -> list[Tensor]:  # fmt: skip
    """With gradients for the inputs `needed` only, eager and compiled: gradients are those of the full backward pass.

    The inputs `unsaved` must not be saved; `operations` are those of matrix products in the backward pass. Returns what
    eager mode saves.
    """
    full = results(function, inputs, *weights)[-len(inputs) :]
    calls, all_saved = [function], []
    if DEVICE == "cuda" or os.environ.get("FASTMUM_KERNELS") != "triton":  # the interpreter cannot be traced
        calls.append(torch.compile(function, fullgraph=True, backend="aot_eager"))
    for call in calls:
        leaves = [x.detach().clone().requires_grad_(i in needed) for i, x in enumerate(inputs)]
        all_saved.append(saved := [])
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            outs = call(*leaves)
        kept = {x.untyped_storage().data_ptr() for x in saved}
        assert not any(leaves[i].untyped_storage().data_ptr() in kept for i in unsaved)
        outs = [outs] if isinstance(outs, Tensor) else outs
        outs, grads = zip(*((out, g) for out, g in zip(outs, weights, strict=True) if out.requires_grad), strict=True)
        with FlopCounterMode(display=False) as counter:
            grads = torch.autograd.grad(outs, [leaves[i] for i in needed], grads)
        assert_equal(grads, [full[i] for i in needed])
        assert counter.get_total_flops() == operations
    return all_saved[0]


def assert_refuses(function: Callable, arguments: dict, error: type[Exception], **changes: object) -> None:
    """Each change of one argument raises `error`, which names the argument."""
    for name, value in changes.items():
        with pytest.raises(error, match=rf"\b{name}\b"):
            function(**arguments | {name: value})
