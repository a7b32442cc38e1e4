"""The predicted cost of the full-size step is within the record, and the record within the goals; its components."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_report import __main__ as kernel_report
from benchmarks.kernel_report.cases import Case, Sizes
from benchmarks.offline import report
from benchmarks.offline.__main__ import main
from benchmarks.offline.gpus import GPUS, LEAST_SECONDS
from benchmarks.offline.kernel import ATEN, OURS, PRODUCTS, Kernel, seconds
from benchmarks.offline.operators import CHUNK, CHUNKS_A_LAUNCH, kernel_of_launch, kernels_of, nbytes
from benchmarks.offline.operators import multi_tensor_launches as launches_on_lists

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks/offline/record.json").read_text())
# Goals for 96 frames in bfloat16.
BYTES, LAUNCHES = 95e9, 1_200
MILLISECONDS = {"a100": 165, "h200": 56}
CLEAN = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMUM_KERNELS", "FASTMUM_PRODUCTS")}
# They take tensors by address: the prediction counts them at the operator's call.
TABLES = ("adamw", "muon", "total_norm squares")
CASES = [case for case in kernel_report.cases() if not case.name.startswith(TABLES)]


def test_the_record_is_within_the_goals():
    assert RECORD.keys() == GPUS.keys()
    for gpu, sides in RECORD.items():
        for ours in (sides["fastmum"], sides["fastmum_block"]):
            assert ours["bytes"] <= BYTES
            assert ours["launches"] <= LAUNCHES
            assert ours["predicted_ms"] <= MILLISECONDS.get(gpu, float("inf"))
        # Compiled block by block the peak is 0.53 of the eager reference's.
        assert 2 * sides["fastmum"]["peak_bytes"] <= sides["reference"]["peak_bytes"]


@pytest.mark.skipif(not torch.version.cuda, reason="this build of torch cannot lower for CUDA")
@pytest.mark.parametrize(
    ("gpu", "sides"),
    [
        pytest.param("h200", ["fastmum"], marks=pytest.mark.slow),
        *(pytest.param(gpu, RECORD[gpu], marks=pytest.mark.exhaustive) for gpu in RECORD),
    ],
)
def test_a_step_moves_and_launches_no_more_than_recorded(gpu, sides):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.offline", "--json", f"--gpu={gpu}", *(f"--side={s}" for s in sides)]
    # A separate process, where Triton compiles instead of interpreting.
    result = subprocess.run(command, env=CLEAN, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for side in sides:
        found, recorded = json.loads(result.stdout)[side], RECORD[gpu][side]
        larger = [key for key in ("flops", "bytes", "launches", "peak_bytes") if found[key] > recorded[key]]
        assert not larger, f"{side} on {gpu}; if intended: `python -m benchmarks.offline --record`"
        assert found["predicted_ms"] <= 1.0001 * recorded["predicted_ms"]
        assert found["spilled"] == []


@pytest.mark.slow
@pytest.mark.skipif(not torch.version.cuda, reason="this build of torch cannot lower for CUDA")
def test_updates_by_muon_are_shared_over_devices():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.offline", "--updates"]
    result = subprocess.run(command, cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=900, check=True)
    header, *rows = [line.split() for line in result.stdout.splitlines()]
    assert header[-3:] == list(GPUS)
    adamw, one, eight, many = ([float(ms) for ms in row[-3:]] for row in rows)
    for times in zip(adamw, many, eight, one, strict=True):
        assert list(times) == sorted(times)
    assert one[0] > 3 * eight[0]


def test_a_kernel_takes_the_slower_of_its_operations_and_its_bytes():
    gpu = GPUS["a100"]
    assert gpu.seconds(0, 0) == LEAST_SECONDS
    assert gpu.seconds(0.7 * 312e12, 1) == pytest.approx(1)
    assert gpu.seconds(1, 0.85 * 2.039e12) == pytest.approx(1)
    kernels = [Kernel("a", PRODUCTS, int(312e12), 0), Kernel("b", OURS, 0, int(2.039e12)), Kernel("c", ATEN, 0, 1)]
    assert seconds(kernels, gpu) == pytest.approx(1 / 0.7 + 1 / 0.85 + 3e-6)


def test_operations_and_bytes_of_operators():
    a, b = torch.empty(8, 4, device="meta"), torch.empty(4, 16, device="meta")
    (kernel,) = kernels_of(torch.ops.aten.mm.default, (a, b), {}, a @ b, 1)
    assert kernel == Kernel("mm", PRODUCTS, 2 * 8 * 4 * 16, 4 * (8 * 4 + 4 * 16 + 8 * 16))
    assert kernels_of(torch.ops.aten.view.default, (a, [32]), {}, a.view(32), 1) == []
    assert nbytes(torch.empty(1, 4, device="meta").expand(8, 4)) == 16, "repeated values are read once"
    ids = torch.empty(3, dtype=torch.int64, device="meta")
    (kernel,) = kernels_of(torch.ops.aten.index_select.default, (a, 0, ids), {}, a[:3], 1)
    assert kernel.moved == 2 * 3 * 4 * 4 + 3 * 8, "a gather reads only the selected rows"


def test_launches_of_operators_on_lists():
    full = CHUNK * CHUNKS_A_LAUNCH
    lists = [([1] * 110, 1), ([1] * 111, 1), ([1] * 31, 5), ([full], 4), ([full + 1], 4), ([], 1)]
    assert [launches_on_lists(numels, depth) for numels, depth in lists] == [1, 2, 2, 1, 2, 0]


@pytest.mark.parametrize("arch", kernel_report.GPUS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prediction_and_kernel_report_count_the_same_bytes(case: Case, arch: int):
    pytest.importorskip("triton")
    launch = kernel_report.record(case, arch)
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    # Another kernel reads the partial sums, and writes the mask token's gradient.
    expected = case.least + sum(values[f"{name}_ptr"].nbytes for name in case.partial)
    expected -= 4 * Sizes().width if case.name.startswith("scatter_tokens backward") else 0
    kernel = kernel_of_launch(launch)
    assert (kernel.moved, kernel.flops) == (expected, case.operations)


@pytest.fixture
def compiled_mode(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    logging.disable(logging.NOTSET)  # the command disables it for its process


@pytest.mark.usefixtures("compiled_mode")
def test_invalid_arguments(monkeypatch, refusal):
    for words, message in (
        (["--frames", 10, "--views", 4], "--frames is 10"),
        (["--frames", 0], "--frames is 0"),
        (["--frames", -5], "--frames is -5"),
        (["--record", "--frames", 8, "--views", 4], "--record"),
    ):
        assert message in refusal(main, *words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in refusal(main)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
@pytest.mark.usefixtures("compiled_mode")
def test_default_views_divide_the_frames(monkeypatch, capsys, refusal):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in refusal(main)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "'mum_huge'" in refusal(main, "--model", "mum_huge")
    batches = []
    monkeypatch.setattr(report, "measure", lambda config, batch, *more: batches.append(batch) or {})
    for frames, views in ((96, 12), (8, 8), (22, 11), (13, 1), (1, 1)):
        assert main(["--json", "--frames", str(frames)]) == 0
        assert batches.pop() == (frames, views, 256)
        assert f'"views": {views},' in capsys.readouterr().out
