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
from benchmarks.offline.efficiency import GAP, IDLE, LEAST, TABLE, Efficiency, Range, efficiencies
from benchmarks.offline.gpus import GPUS
from benchmarks.offline.kernel import ATEN, NORM, OURS, PRODUCTS, Kernel, grouped
from benchmarks.offline.operators import CHUNK, CHUNKS_A_LAUNCH, kernel_of_launch, kernels_of, nbytes
from benchmarks.offline.operators import multi_tensor_launches as launches_on_lists
from benchmarks.offline.pricing import Assumptions
from benchmarks.projection import PAGE, page

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks/offline/record.json").read_text())
# Goals for 96 frames in bfloat16.
BYTES, LAUNCHES = 95e9, 1_200
CLEAN = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMUM_KERNELS", "FASTMUM_PRODUCTS")}
# They take tensors by address: the prediction counts them at the operator's call.
TABLES = ("adamw", "muon", "total_norm squares")
CASES = [case for case in kernel_report.cases() if not case.name.startswith(TABLES)]


def test_the_record_is_within_the_goals():
    assert RECORD.keys() == report.LOWERED.keys() == {str(gpu.arch) for gpu in GPUS.values()}
    for sides in RECORD.values():
        for ours in (sides["fastmum"], sides["fastmum_block"]):
            assert ours["bytes"] <= BYTES
            assert ours["launches"] <= LAUNCHES
        # Compiled block by block the peak is 0.53 of the eager reference's.
        assert 2 * sides["fastmum"]["peak_bytes"] <= sides["reference"]["peak_bytes"]


@pytest.mark.skipif(not torch.version.cuda, reason="this build of torch cannot lower for CUDA")
@pytest.mark.parametrize(
    ("gpu", "sides"),
    [
        pytest.param("h200", ["fastmum"], marks=pytest.mark.slow),
        *(pytest.param(gpu, (*report.SIDES, report.BLOCKS), marks=pytest.mark.exhaustive) for gpu in GPUS),
    ],
)
def test_a_step_moves_and_launches_no_more_than_recorded(gpu, sides):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.offline", "--json", f"--gpu={gpu}", *(f"--side={s}" for s in sides)]
    # A separate process, where Triton compiles instead of interpreting.
    result = subprocess.run(command, env=CLEAN, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    priced = report.predictions(gpu)
    for side in sides:
        found, recorded = json.loads(result.stdout)[side], RECORD[str(GPUS[gpu].arch)][side]
        larger = [key for key in ("flops", "bytes", "launches", "peak_bytes") if found[key] > recorded[key]]
        assert not larger, f"{side} on {gpu}; if intended: `python -m benchmarks.offline --record`"
        assert found["predicted_ms"]["likely"] <= 1.0001 * priced[side]["predicted_ms"]["likely"]
        assert found["spilled"] == []


@pytest.mark.slow
@pytest.mark.skipif(not torch.version.cuda, reason="this build of torch cannot lower for CUDA")
def test_updates_by_muon_are_shared_over_devices():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.offline", "--updates"]
    result = subprocess.run(command, cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=900, check=True)
    updates, steps = ([line.split() for line in part.splitlines()] for part in result.stdout.split("\n\n"))
    for header, *rows in (updates, steps):
        assert header[-3:] == list(GPUS)
        # each cell is "likely (low to high)"
        adamw, several, one, eight, many = ([float(ms) for ms in row[-12::4]] for row in rows)
        for times in zip(adamw, several, many, eight, one, strict=True):
            assert list(times) == sorted(times)
    assert float(updates[3][-12]) > 3 * float(updates[4][-12])


def shares(**values: tuple[float, float, float]) -> dict[str, Efficiency]:
    return {name: Efficiency(*each, "made up") for name, each in values.items()}


SHARES = shares(
    cublas=(0.4, 0.5, 0.8), triton=(0.2, 0.25, 0.5), triton_tma=(0.4, 0.5, 1), elementwise=(0.5, 0.8, 1),
    norms=(0.2, 0.4, 0.5), fa3_spans_forward=(0.25, 0.5, 1), cudnn_frames_backward=(0.1, 0.2, 0.25),
)  # fmt: skip
H100 = GPUS["h100"]


@pytest.mark.parametrize(
    ("kernel", "low", "likely", "high"),
    [  # seconds, of H100: 989e12 operations, 3.35e12 bytes
        (Kernel("mm", PRODUCTS, int(989e12), 0), 1.25, 2, 2.5),
        (Kernel("mm", PRODUCTS, int(9.89e12), int(3.35e12)), 1, 1.25, 2),
        (Kernel("_linear_gelu_kernel", OURS + "linear_gelu", int(989e12), 0), 1, 2, 2.5),
        (Kernel("_add_norm_kernel", OURS + "add_norm", 0, int(3.35e12)), 2, 2.5, 5),
        (Kernel("_foreach_norm", NORM, 0, int(3.35e12)), 2, 2.5, 5),
        (Kernel("add", ATEN, 0, int(3.35e12)), 1, 1.25, 2),
        (Kernel("add", ATEN, 0, 1), LEAST, LEAST, LEAST),
        (Kernel("attention", "varlen spans forward", int(989e12), 0, 132 * 10**6), 1, 2, 4),
        (Kernel("attention", "dense frames backward", int(98.9e12), 0), 0.4, 0.5, 1),
    ],
)
def test_a_kernel_takes_the_longer_of_its_operations_and_its_bytes(kernel, low, likely, high):
    chosen = Assumptions(H100, SHARES, attention="fa3", tma=True, cuda_graphs=True)
    times = chosen._replace(cuda_graphs=False).device(grouped([kernel, kernel]))
    assert times == pytest.approx([2 * (t + gap) for t, gap in zip((low, likely, high), GAP, strict=True)])
    padded = chosen.device(grouped([kernel, kernel]))
    assert padded == pytest.approx([t + 2e6 * block * bool(kernel.idle) for t, block in zip(times, IDLE, strict=True)])
    waiting = chosen.step(grouped([kernel]), Range(0, 10, 20))
    assert waiting == pytest.approx([chosen.device(grouped([kernel])).low, 10, 20])


def test_ranges_are_in_order():
    for table in TABLE.values():
        for name, share in table.items():
            assert 0 < share.low <= share.likely <= share.high < 1, name
            assert share.source
    for gpu in GPUS:
        for key, each in report.predictions(gpu).items():
            if key.startswith(("fastmum", "reference")):
                for times in (each["predicted_ms"], each["compiled_ratio"], *(part["ms"] for part in each["parts"])):
                    assert times["low"] <= times["likely"] <= times["high"]
                assert sum(part["ms"]["likely"] for part in each["parts"]) == pytest.approx(each["device_ms"]["likely"])


def test_a_ratio_varies_only_with_what_differs():
    none = Range(0, 0, 0)
    ours, theirs = (grouped([Kernel("mm", PRODUCTS, n * 10**13, 0)]) for n in (1, 3))
    chosen = Assumptions(H100, SHARES)
    assert chosen.ratio(theirs, ours, (none, none)) == pytest.approx([3, 3, 3], rel=1e-3)
    fused = grouped([Kernel("_linear_gelu_kernel", OURS + "linear_gelu", 10**13, 0)])
    assert chosen.ratio(theirs, fused, (none, none)) == pytest.approx([0.75, 1.5, 3.75], rel=1e-3)


def test_measured_efficiencies_replace_the_table(tmp_path, capsys, refusal):
    file = tmp_path / "h100.json"
    measured = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-12-01", "efficiency": {"cublas": {"likely": 0.9}}}
    file.write_text(json.dumps(measured))
    words = "--recorded", "--gpu", "h100", "--side", "fastmum"
    assert main([*words, "--efficiency", str(file)]) == 0
    assert "0.90 (0.90 to 0.90), measured on NVIDIA H100 80GB HBM3, 2026-12-01" in capsys.readouterr().out
    found = efficiencies("h100", file)
    assert {name for name in found if found[name] != TABLE["h100"][name]} == {"cublas"}
    assert main([*words, "--json", "--host-ms", "1000", "2000", "3000"]) == 0
    times = json.loads(capsys.readouterr().out)["fastmum"]["predicted_ms"]
    assert times == pytest.approx({"low": 1000, "likely": 2000, "high": 3000})
    assert "'fa3_" in refusal(main, "--recorded", "--attention", "fa3")
    assert "--host-ms" in refusal(main, *words, "--host-ms", 3, 2, 1)
    for change in ({"efficiency": {"cubism": {"likely": 1}}}, {"efficiency": {"cublas": {"high": 1}}},
                   {"efficiency": {"cublas": {"likely": 0.5, "low": 0.6}}}, {"gpu": "NVIDIA A100"}):  # fmt: skip
        file.write_text(json.dumps(measured | change))
        assert "h100.json" in refusal(main, *words, "--efficiency", file)


def test_the_page_and_the_readme_show_the_record():
    text = page([report.predictions(gpu) for gpu in GPUS])
    assert PAGE.read_text() == text, "write it with python -m benchmarks.offline --page"
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(("| A100-", "| H"))]
    assert len(rows) > len(GPUS)
    assert set(rows) <= set(text.splitlines()), "copy them from docs/predictions.md"


def test_operations_and_bytes_of_operators():
    a, b = torch.empty(8, 4, device="meta"), torch.empty(4, 16, device="meta")
    (kernel,) = kernels_of(torch.ops.aten.mm.default, (a, b), {}, a @ b, 1)
    assert kernel == Kernel("mm", PRODUCTS, 2 * 8 * 4 * 16, 4 * (8 * 4 + 4 * 16 + 8 * 16))
    assert kernels_of(torch.ops.aten.view.default, (a, [32]), {}, a.view(32), 1) == []
    assert nbytes(torch.empty(1, 4, device="meta").expand(8, 4)) == 16, "repeated values are read once"
    ids = torch.empty(3, dtype=torch.int64, device="meta")
    (kernel,) = kernels_of(torch.ops.aten.index_select.default, (a, 0, ids), {}, a[:3], 1)
    assert kernel.moved == 2 * 3 * 4 * 4 + 3 * 8, "a gather reads only the selected rows"


def test_empty_blocks_of_padded_attention():
    q, cu = torch.empty(2 * 300, 4, 64, device="meta"), torch.empty(9, dtype=torch.int32, device="meta")
    args = q, q, q, cu, cu, None, 500, 600, "FA2"
    attention = torch.ops.fastmum.varlen_attention
    (kernel,) = kernels_of(attention.default, args, {}, attention(*args), 2)
    assert kernel[1:3] == ("varlen frames forward", 2 * 2 * 2 * 4 * 300 * 300 * 64)
    assert kernel.idle == 4 * (8 * 4 - 2 * 3)
    backward, args = torch.ops.fastmum.varlen_attention_backward, (q, *args[:6], q, q, *args[6:])
    (kernel,) = kernels_of(backward.default, args, {}, backward(*args), 2)
    assert kernel.kind == "varlen frames backward"
    assert kernel.idle == 2 * 4 * (8 * 4 - 2 * 3) + 4 * (8 * 5 - 2 * 3)


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
    from benchmarks.offline import steps

    monkeypatch.setattr(steps, "measure", lambda config, batch, *more: batches.append(batch) or {})
    for frames, views in ((96, 12), (8, 8), (22, 11), (13, 1), (1, 1)):
        assert main(["--json", "--frames", str(frames)]) == 0
        assert batches.pop() == (frames, views, 256)
        assert f'"views": {views},' in capsys.readouterr().out
