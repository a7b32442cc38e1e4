"""The kernels' report: what the compiler makes of them, and that its formulas are the bytes that they access."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastmum.kernels
from benchmarks.kernel_report import blocks, cases, matching, muon
from benchmarks.kernel_report.cases import Case, Sizes
from fastmum.kernels.plans import reset

SMALL = Sizes(frames=2, side=64, patch=16, width=128, heads=2)
bf16, fp32 = torch.bfloat16, torch.float32


def run(*arguments: str) -> str:
    """Standard output of Python in another process, where Triton compiles instead of interpreting."""
    pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMUM_KERNELS")}
    result = subprocess.run([sys.executable, *arguments], env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_no_spills_wide_accesses_and_least_bytes() -> None:
    """For both architectures."""
    rows = json.loads(run("-m", "fastmum.kernels.report", "--arch", "sm_80", "--arch", "sm_90", "--json"))
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    assert [row for row in rows if row["spills"]] == []
    assert [row for row in rows if row["vector"] is not None and row["vector"] < 0.95] == []
    assert {row["kernel"] for row in rows if row["vector"] is None} == {"total_norm root"}
    assert [row for row in rows if not 1 <= row["ratio"] <= 1.1] == []
    # Two programs of eight warps on a multiprocessor: one stores its tiles while the other multiplies.
    symmetric = [row for row in rows if row["kernel"].startswith("symmetric") and row["arch"] == "sm_90"]
    assert symmetric
    assert [row for row in symmetric if row["registers"] > 128] == []
    # The GELU after a product: 0.35 of the product's cycles at the decoder's width on sm_90; "act" computes the GELU
    # and its slope after one product, and runs in the encoder.
    fused = [row for row in rows if row["kernel"].startswith("linear_gelu")]
    assert len(fused) == 18
    for row in fused:
        act = "act" in row["kernel"]
        assert row["epilogue"] <= (0.43 if act else 0.35) / (1 if row["arch"] == "sm_90" else 1.9), row
        # Two programs on a multiprocessor, of 65,536 registers and 164 or 228 kB of shared memory.
        assert 2 * 32 * row["warps"] * 8 * -(-row["registers"] // 8) <= 65_536, row
        assert 2 * (row["shared"] + 1024) <= (164 if row["arch"] == "sm_80" else 228) * 1024, row
    assert all(row["epilogue"] <= 0.27 for row in rows if row["kernel"].startswith("rotary_linear"))


COMPILED = """
from benchmarks.kernel_report import __main__ as report
from benchmarks.kernel_report.compiled import compile_launch, identity
for frames in (1, 2, 15, 16, 96):
    print([identity(report.record(case, 90)) for case in report.cases(frames)])
for case in report.cases():
    if case.name.startswith(("adamw", "muon", "total_norm squares")):
        made = compile_launch(report.record(case, 90), 90)
        print(case.name, made.spills, made.vector_share(case.main), sep=", ")
"""


def test_the_number_of_frames_compiles_nothing_anew_and_the_optimiser_uses_wide_accesses() -> None:
    """1 and multiples of 16 are special to Triton, unless an argument is excepted. The optimiser's accesses are by a
    table of addresses, whose alignment the compiler cannot see."""
    found = run("-c", COMPILED).splitlines()
    assert len(set(found[:5])) == 1
    assert [row.split(", ")[1:] for row in found[5:]] == 8 * [["0", "1.0"]], found[5:]


def small_cases() -> list[Case]:
    """Every kernel, on the CPU."""
    s, tokens = SMALL, 1 + SMALL.patches
    gradients, projections = [(300, 256), (40,)], ("qkv", "q", "kv")  # more and less than a chunk
    return [
        cases.gather_patches_case(s, fp32),
        *(cases.patch_loss_case(s, fp32, backward) for backward in (False, True)),
        cases.scatter_case(s, fp32),
        cases.scatter_backward_case(s, fp32),
        cases.gather_case(s, fp32),
        cases.gather_backward_case(s, fp32),
        *(cases.rope_case(s, fp32, s.patches, copy) for copy in (False, True)),
        *(blocks.add_norm_case(s, dtype, tokens) for dtype in (bf16, fp32)),
        *(blocks.add_norm_backward_case(s, dtype, tokens, last) for dtype, last in ((bf16, False), (fp32, True))),
        *(blocks.linear_gelu_case(s, bf16, tokens, keep) for keep in (False, True)),
        *(blocks.linear_gelu_backward_case(s, bf16, tokens, recompute) for recompute in ("none", "act", "mlp")),
        *(blocks.gelu_backward_case(s, fp32, tokens, again) for again in (False, True)),
        *(blocks.rotary_linear_case(s, bf16, tokens, parts) for parts in projections),
        *(blocks.pack_case(s, bf16, tokens, parts) for parts in projections),
        *(blocks.finish_sums_case(count, 70, s.width, dtype) for count, dtype in ((3, bf16), (1, fp32))),
        *(blocks.squares_case(gradients, dtype) for dtype in (bf16, fp32)),
        blocks.root_case(gradients, fp32),
        *(blocks.adamw_case(gradients, split) for split in (True, False)),
        *(muon.symmetric_case((2, 150, 37), dtype, way) for dtype in (bf16, fp32) for way in ("add", "")),
        muon.momentum_case(gradients, bf16),
        *(muon.apply_case(gradients, split) for split in (True, False)),
        *(matching.sized_case((2, 3, 5, 24), r, dtype, back) for r, dtype, back in ((2, bf16, False), (1, fp32, True))),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize("number", range(42))
def test_formula_is_the_bytes_that_the_kernel_accesses(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every byte that the interpreted kernel loads or stores, once for loads and once for stores."""
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    monkeypatch.setenv("FASTMUM_KERNELS", "triton")
    reset()
    every = small_cases()
    assert len(every) == 42
    case = every[number]
    touched: dict[str, set[int]] = {"load": set(), "store": set()}
    size: dict[int, int] = {}
    partial: list[int] = []
    counting = False

    def run_kernel(self: object, *args: object, **kwargs: object) -> None:
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
    monkeypatch.setattr(executor, "__call__", run_kernel)
    # Unmasked accesses go through the masked ones.
    monkeypatch.setattr(builder, "create_masked_load", spy("load", builder.create_masked_load, 1))
    monkeypatch.setattr(builder, "create_masked_store", spy("store", builder.create_masked_store, 2))
    case.call()
    counted = sum(size[a] for kind in touched.values() for a in kind)
    assert len(partial) == len(case.partial)
    # Another kernel, or PyTorch, reads the partial sums.
    expected = case.least + sum(partial)
    if case.name.startswith("scatter_tokens backward"):
        expected -= 4 * SMALL.width  # the second stage writes the mask token's gradient
    assert counted == pytest.approx(expected, abs=8)  # the formulas leave the optimiser's scalars out


def test_without_a_checkout_the_report_is_refused(tmp_path: Path) -> None:
    script = Path(fastmum.kernels.__file__).with_name("report.py")
    copied = tmp_path / "fastmum/kernels/report.py"
    copied.parent.mkdir(parents=True)
    shutil.copy(script, copied)
    result = subprocess.run([sys.executable, copied], capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "needs a checkout" in result.stderr
