"""What the compiler makes of the kernels, and what they really touch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from support import DEVICE, MEAN, STD, guarded, split_ids

from fastmum.kernels import adamw, gather_patches, gather_tokens, patch_loss, rope_qk, scatter_tokens, sums, total_norm
from fastmum.kernels import report_blocks as blocks
from fastmum.kernels import report_cases as cases
from fastmum.kernels.report_cases import Case, Sizes

SMALL = Sizes(frames=2, side=64, patch=16, width=128, heads=2)
T, D, N = SMALL.frames * (1 + SMALL.patches), SMALL.width, 4 * SMALL.width
SHAPES = [(300, 256), (40,)]  # more than one chunk, less than one
bf16, fp32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """The report for both architectures; in a process of its own, where Triton compiles instead of interpreting."""
    pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMUM_KERNELS")}
    command = [sys.executable, "-m", "fastmum.kernels.report", "--arch", "sm_80", "--arch", "sm_90", "--json"]
    result = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_nothing_spills(rows: list[dict]) -> None:
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    assert [row for row in rows if row["spills"]] == []


@pytest.mark.slow
def test_main_streams_are_vectorised(rows: list[dict]) -> None:
    assert [row for row in rows if row["vector"] is not None and row["vector"] < 0.95] == []
    assert {row["kernel"] for row in rows if row["vector"] is None} == {"total_norm root"}


@pytest.mark.slow
def test_bytes_are_the_least(rows: list[dict]) -> None:
    assert [row for row in rows if not 1 <= row["ratio"] <= 1.1] == []


SPECIALISATIONS = """
from fastmum.kernels import report
from fastmum.kernels.compiled import identity
for frames in (1, 2, 15, 16, 96):
    print([identity(report.record(case, 90)) for case in report.cases(frames)])
"""


def test_the_number_of_frames_compiles_nothing_anew() -> None:
    """1 and multiples of 16 are special to Triton, unless an argument is excepted."""
    pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMUM_KERNELS")}
    result = subprocess.run([sys.executable, "-c", SPECIALISATIONS], env=clean, capture_output=True, text=True)
    found = result.stdout.splitlines()
    assert len(found) == 5, result.stderr
    assert len(set(found)) == 1


def random(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    """Amid NaN."""
    return guarded(torch.randn(*shape, device=DEVICE).to(dtype))


def small_calls() -> list[tuple[Case, Callable[[], object]]]:
    """(case, the same call with data) for every kernel."""
    s, ops = SMALL, torch.ops.fastmum
    everywhere = 1 + s.patches
    frames = torch.randint(0, 256, (s.frames, s.side, s.side, 3), dtype=torch.uint8, device=DEVICE)
    visible_ids, masked_ids = split_ids(s.frames, s.patches, s.visible)
    pred = random(s.frames, s.masked, 768, dtype=fp32)
    settings = ([0.017] * 3, [2.0] * 3, 16, True, 1e-6)
    positions = torch.arange(-1, s.patches, device=DEVICE).repeat(s.frames)
    table = torch.randn(s.patches, 64, device=DEVICE)
    rotation = positions, table[:, :32], table[:, 32:]
    qkv = random(T, 3 * D, dtype=fp32)

    def tokens(n: int) -> torch.Tensor:
        return random(s.frames, n, D, dtype=fp32)

    def stream(dtype: torch.dtype, backward: bool, last: bool = False) -> tuple:
        if not backward:
            return random(T, D, dtype=fp32), random(T, D, dtype=dtype), *random(3, D, dtype=fp32).unbind(), 1e-5, dtype
        grads = None if last else random(T, D, dtype=fp32), random(T, D, dtype=dtype)
        return *grads, random(T, D, dtype=dtype), random(T, 1, dtype=fp32), *random(2, D, dtype=fp32), fp32, dtype

    def optimised(split: bool) -> tuple:
        dtype, scalar = bf16 if split else fp32, torch.zeros((), device=DEVICE)
        lists = [[random(*shape, dtype=kind).abs() for shape in SHAPES] for kind in (dtype, dtype, fp32, fp32)]
        return *lists, [x.short() for x in lists[0]] if split else [], 1 + scalar, 1e-3, (0.9, 0.95), 0.05, 1e-8, scalar

    gradients = [[random(*shape, dtype=dtype) for shape in SHAPES] for dtype in (bf16, fp32)]
    projections = ("qkv", 3, 2), ("q", 1, 1), ("kv", 2, 1)  # parts, how many, and how many are rotated
    heads = random(3, T, s.heads, D // s.heads).unbind()
    mlp = {"all": (random(T, N), False), "hidden": (random(T, N), True)}
    return [
        (
            cases.gather_patches_case(s, fp32),
            lambda: gather_patches(frames, visible_ids, MEAN, STD, 16, fp32),
        ),
        (
            cases.patch_loss_case(s, fp32, backward=False),
            lambda: patch_loss(pred, frames, masked_ids, MEAN, STD, 16),
        ),
        (
            cases.patch_loss_case(s, fp32, backward=True),
            lambda: ops.patch_loss_backward(torch.ones(s.frames, device=DEVICE), pred, frames, masked_ids, *settings),
        ),
        (
            cases.scatter_case(s, fp32),
            lambda: scatter_tokens(tokens(1 + s.visible), random(D, dtype=fp32), visible_ids, s.patches),
        ),
        (
            cases.scatter_backward_case(s, fp32),
            lambda: ops.scatter_tokens_backward(tokens(everywhere), visible_ids, fp32),
        ),
        (cases.gather_case(s, fp32), lambda: gather_tokens(tokens(everywhere), masked_ids)),
        (
            cases.gather_backward_case(s, fp32),
            lambda: ops.gather_tokens_backward(tokens(s.masked), masked_ids, s.patches),
        ),
        (
            cases.rope_case(s, fp32, s.patches),
            lambda: rope_qk(qkv, positions, table, table.clone(), s.heads, inplace=True),
        ),
        (
            cases.rope_case(s, fp32, s.patches, copy=True),
            lambda: rope_qk(qkv, positions, table, table.clone(), s.heads),
        ),
        *(
            (blocks.add_norm_case(s, dtype, everywhere), lambda dtype=dtype: ops.add_norm(*stream(dtype, False)))
            for dtype in (bf16, fp32)
        ),
        *(
            (
                blocks.add_norm_backward_case(s, dtype, everywhere, last),
                lambda dtype=dtype, last=last: ops.add_norm_backward(*stream(dtype, True, last)),
            )
            for dtype in (bf16, fp32)
            for last in (False, True)
        ),
        *(
            (
                blocks.linear_gelu_case(s, bf16, everywhere, keep),
                lambda keep=keep: ops.linear_gelu(random(T, D), random(N, D), random(N), keep),
            )
            for keep in (False, True)
        ),
        *(
            (
                blocks.linear_gelu_backward_case(s, bf16, everywhere, keep),
                lambda given=given: ops.linear_gelu_backward(random(T, D), random(D, N), *given),
            )
            for keep, given in mlp.items()
        ),
        (
            blocks.linear_gelu_backward_case(s, bf16, everywhere, "input"),
            lambda: ops.linear_gelu_again_backward(random(T, D), random(D, N), random(T, D), random(N, D), random(N)),
        ),
        *(
            (
                blocks.gelu_backward_case(s, fp32, everywhere, again),
                lambda again=again: ops.linear_gelu_backward(
                    random(T, D, dtype=fp32), random(D, N, dtype=fp32), random(T, N, dtype=fp32), again
                ),
            )
            for again in (False, True)
        ),
        *(
            (
                blocks.rotary_linear_case(s, bf16, everywhere, names),
                lambda n=n, rotated=rotated: ops.rotary_linear(
                    random(T, D), random(n * D, D), random(n * D), *rotation, rotated * s.heads, False
                ),
            )
            for names, n, rotated in projections
        ),
        *(
            (
                blocks.pack_case(s, bf16, everywhere, names),
                lambda n=n, rotated=rotated: ops.pack_rotated(list(heads[:n]), *rotation, rotated, False),
            )
            for names, n, rotated in projections
        ),
        (blocks.finish_sums_case(3, 70, D, bf16), lambda: sums.finish_sums(random(3, 70, D, dtype=fp32), [bf16] * 3)),
        (blocks.finish_sums_case(1, 70, D, fp32), lambda: sums.finish_sums(random(1, 70, D, dtype=fp32), [fp32])),
        (blocks.squares_case(SHAPES, bf16), lambda: total_norm(gradients[0])),
        (blocks.squares_case(SHAPES, fp32), lambda: total_norm(gradients[1])),
        (blocks.root_case(SHAPES, fp32), lambda: total_norm(gradients[1])),
        (blocks.adamw_case(SHAPES, split=True), lambda: adamw.adamw_(*optimised(True))),
        (blocks.adamw_case(SHAPES, split=False), lambda: adamw.adamw_(*optimised(False))),
    ]


@pytest.mark.skipif(DEVICE != "cpu", reason="counts in the interpreter")
@pytest.mark.parametrize("number", range(35))
def test_formula_is_what_the_kernel_touches(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every byte that the interpreted kernel loads or stores, once for loads and once for stores."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    monkeypatch.setenv("FASTMUM_KERNELS", "triton")
    calls = small_calls()
    assert len(calls) == 35
    case, call = calls[number]
    touched: dict[str, set[int]] = {"load": set(), "store": set()}
    size: dict[int, int] = {}
    partial: list[int] = []
    counting = False

    def run(self: object, *args: object, **kwargs: object) -> None:
        nonlocal counting
        counting = case.kernel is None or self.fn.__name__ == case.kernel.__name__
        if counting:
            values = dict(zip(self.arg_names, args, strict=False))
            partial.extend(values[f"{name}_ptr"].nbytes for name in case.partial)
        plain_run(self, *args, **kwargs)

    def spy(kind: str, plain: Callable, mask_at: int) -> Callable:
        def access(self: object, *args: object) -> object:
            if counting:
                address, active = args[0].data.ravel(), args[mask_at].data.ravel().astype(bool)
                width = args[0].get_element_ty().primitive_bitwidth // 8
                addresses = address[active].tolist()
                touched[kind].update(addresses)
                size.update(dict.fromkeys(addresses, width))
            return plain(self, *args)

        return access

    plain_run = executor.__call__
    monkeypatch.setattr(executor, "__call__", run)
    # Unmasked accesses go through the masked ones.
    monkeypatch.setattr(builder, "create_masked_load", spy("load", builder.create_masked_load, 1))
    monkeypatch.setattr(builder, "create_masked_store", spy("store", builder.create_masked_store, 2))
    call()
    counted = sum(size[a] for kind in touched.values() for a in kind)
    assert len(partial) == len(case.partial)
    # What another kernel, or PyTorch, reads of the partial sums is not touched here.
    expected = case.least + sum(partial)
    if case.name.startswith("scatter_tokens backward"):
        expected -= 4 * D  # the mask token's gradient is written in the second stage
    assert counted == pytest.approx(expected, abs=8)  # the optimiser's scalars are in no formula
