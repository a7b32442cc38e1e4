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

from fastmum.kernels import gather_patches, gather_tokens, patch_loss, rope_qk, scatter_tokens
from fastmum.kernels.report import (
    Case,
    Sizes,
    gather_case,
    gather_patches_case,
    patch_loss_case,
    rope_case,
    scatter_case,
)
from fastmum.kernels.report import gather_backward_case as gather_backward
from fastmum.kernels.report import scatter_backward_case as scatter_backward

SMALL = Sizes(frames=2, side=64, patch=16, width=128, heads=2)
fp32 = torch.float32


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """The report for both architectures; in a process of its own, where Triton compiles instead of interpreting."""
    pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMUM_KERNELS")}
    command = [sys.executable, "-m", "fastmum.kernels.report", "--arch", "sm_80", "--arch", "sm_90", "--json"]
    result = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_nothing_spills(rows: list[dict]) -> None:
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    assert [row for row in rows if row["spills"]] == []


def test_main_streams_are_vectorised(rows: list[dict]) -> None:
    assert [row for row in rows if row["vector"] < 0.95] == []


def test_bytes_are_the_least(rows: list[dict]) -> None:
    assert [row for row in rows if not 1 <= row["ratio"] <= 1.1] == []


SPECIALISATIONS = """
from fastmum.kernels import report
from fastmum.kernels.compiled import specialise
for frames in (1, 2, 15, 16, 96):
    for sizes in ("PAPER", "ENCODER", "RELEASED"):
        setattr(report, sizes, getattr(report, sizes)._replace(frames=frames))
    print([specialise(report.record(case, 90)) for case in report.cases()])
"""


def test_the_number_of_frames_compiles_nothing_anew() -> None:
    """1 and multiples of 16 are special to Triton, unless an argument is excepted."""
    pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMUM_KERNELS")}
    result = subprocess.run([sys.executable, "-c", SPECIALISATIONS], env=clean, capture_output=True, text=True)
    found = result.stdout.splitlines()
    assert len(found) == 5, result.stderr
    assert len(set(found)) == 1


def tokens(n: int) -> torch.Tensor:
    return guarded(torch.randn(SMALL.frames, n, SMALL.width, device=DEVICE))


def small_calls() -> list[tuple[str, Case, Callable[[], object]]]:
    """(name, case, the same call with data) for every kernel."""
    s = SMALL
    frames = torch.randint(0, 256, (s.frames, s.side, s.side, 3), dtype=torch.uint8, device=DEVICE)
    visible_ids, masked_ids = split_ids(s.frames, s.patches, s.visible)
    pred = torch.randn(s.frames, s.masked, 768, device=DEVICE)
    settings = ([0.017] * 3, [2.0] * 3, 16, True, 1e-6)
    positions = torch.arange(-1, s.patches, device=DEVICE).repeat(s.frames)
    table, qkv = torch.randn(s.patches, 64, device=DEVICE), torch.randn(len(positions), 3 * s.width, device=DEVICE)
    ops = torch.ops.fastmum
    return [
        (
            "gather_patches",
            gather_patches_case(s, fp32),
            lambda: gather_patches(frames, visible_ids, MEAN, STD, 16, fp32),
        ),
        (
            "patch_loss",
            patch_loss_case(s, fp32, backward=False),
            lambda: patch_loss(pred, frames, masked_ids, MEAN, STD, 16),
        ),
        (
            "patch_loss_backward",
            patch_loss_case(s, fp32, backward=True),
            lambda: ops.patch_loss_backward(torch.ones(s.frames, device=DEVICE), pred, frames, masked_ids, *settings),
        ),
        (
            "scatter_tokens",
            scatter_case(s, fp32),
            lambda: scatter_tokens(tokens(1 + s.visible), torch.randn(s.width, device=DEVICE), visible_ids, s.patches),
        ),
        (
            "scatter_tokens_backward",
            scatter_backward(s, fp32),
            lambda: ops.scatter_tokens_backward(tokens(1 + s.patches), visible_ids, fp32),
        ),
        ("gather_tokens", gather_case(s, fp32), lambda: gather_tokens(tokens(1 + s.patches), masked_ids)),
        (
            "gather_tokens_backward",
            gather_backward(s, fp32),
            lambda: ops.gather_tokens_backward(tokens(s.masked), masked_ids, s.patches),
        ),
        (
            "rope_in_place",
            rope_case(s, fp32, s.patches),
            lambda: rope_qk(qkv, positions, table, table.clone(), s.heads, inplace=True),
        ),
        (
            "rope_copy",
            rope_case(s, fp32, s.patches, copy=True),
            lambda: rope_qk(qkv, positions, table, table.clone(), s.heads),
        ),
    ]


@pytest.mark.skipif(DEVICE != "cpu", reason="counts in the interpreter")
@pytest.mark.parametrize("number", range(9))
def test_formula_is_what_the_kernel_touches(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every byte that the interpreted kernel loads or stores, once for loads and once for stores."""
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    touched: dict[str, set[int]] = {"load": set(), "store": set()}
    size: dict[int, int] = {}

    def spy(kind: str, plain: Callable, mask_at: int) -> Callable:
        def call(self: object, *args: object) -> object:
            address, active = args[0].data.ravel(), args[mask_at].data.ravel() if mask_at < len(args) else None
            address = address if active is None else address[active]
            width = args[0].get_element_ty().primitive_bitwidth // 8
            touched[kind].update(address.tolist())
            size.update(dict.fromkeys(address.tolist(), width))
            return plain(self, *args)

        return call

    # Unmasked accesses go through the masked ones.
    monkeypatch.setattr(builder, "create_masked_load", spy("load", builder.create_masked_load, 1))
    monkeypatch.setattr(builder, "create_masked_store", spy("store", builder.create_masked_store, 2))
    monkeypatch.setenv("FASTMUM_KERNELS", "triton")
    name, case, call = small_calls()[number]
    call()
    counted = sum(size[a] for kind in touched.values() for a in kind)
    # Half of what is beyond the least is read in the second stage, by PyTorch; scalars are not counted by the formula.
    expected = case.least + case.extra // 2
    if name == "scatter_tokens_backward":
        expected -= 4 * SMALL.width  # the mask token's gradient is written in the second stage
    assert counted == pytest.approx(expected, abs=8)
