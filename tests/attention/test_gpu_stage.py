"""The stage of attention of `benchmarks.gpu`, with torch's kernels computed on the CPU."""

import json

import packages
import pytest

from benchmarks.gpu import attention as stage
from benchmarks.gpu.record import Record
from benchmarks.offline.gpus import GPUS
from fastmum.attention import varlen

KERNELS = "FA2", "cuDNN"


@pytest.fixture
def kernels(monkeypatch):
    kernels = packages.VarlenKernels(monkeypatch)
    monkeypatch.setattr(stage, "kernels_here", lambda: KERNELS)
    yield kernels
    kernels.library._destroy()


def test_exact_and_padded_segments_agree_with_the_truth(kernels, tmp_path):
    record = Record(tmp_path / "attention.json")
    assert stage.measure(record, True, [])
    rows = json.loads(record.file.read_text())["rows"]
    assert {(row["kernel"], row["segments"]) for row in rows} == {
        (kernel, kind) for kernel in (*KERNELS, "sdpa") for kind in ("exact", "padded")
    }
    assert all(row["error"] < 1e-5 and row["repeats"] and row["forward_ms"] > 0 < row["backward_ms"] for row in rows)
    assert {(row["queries"], row["keys"]) for row in rows} == {(9, 9), (6, 9), (3, 3)}
    lengths = [call[1] for call in kernels.calls]
    assert [27, 18, 9] in lengths, "ragged, without empty segments"
    assert [27, 18, 9, 0, 0, 0] in lengths, "with those that CUDA graphs record"


def test_a_version_of_cudnn_that_is_not_used_is_tried_last(kernels, tmp_path, monkeypatch):
    """It may be wrong."""
    monkeypatch.setattr(stage, "kernels_here", lambda: ("FA2",))
    monkeypatch.setattr(stage.torch.cuda, "get_device_capability", lambda: (9, 0))
    sound = varlen.KERNELS["FA2"]
    tried = [False]

    def contestants(given, cut, names, backends, make=stage.contestants):
        tried[0] |= "cuDNN" in names
        return make(given, cut, names, backends)

    def forward(*args):
        out, lse = sound.forward(*args)
        return (out * 2 if tried[0] else out), lse

    monkeypatch.setattr(stage, "contestants", contestants)
    monkeypatch.setitem(varlen.KERNELS, "FA2", sound._replace(forward=forward))  # for short segments cuDNN is FA2
    record = Record(tmp_path / "attention.json")
    assert stage.measure(record, True, [])
    kinds = [(row["kernel"], row["segments"], row["error"] > 0.5) for row in record.rows[-2:]]
    assert kinds == [("cuDNN", "exact", True), ("cuDNN", "padded", True)]
    assert sum(row["kernel"] == "cuDNN" for row in record.rows) == 2


@pytest.mark.parametrize("wrong", ["NaN", "scaled", "other every time", "missing"])
def test_a_wrong_kernel_is_named(kernels, tmp_path, monkeypatch, wrong):
    sound, calls = varlen.KERNELS["FA3"], []

    def forward(*args):
        out, lse = sound.forward(*args)
        calls.append(1)
        if wrong == "missing":
            raise RuntimeError("no such engine\nmore")
        factor = {"NaN": float("nan"), "scaled": 1.1, "other every time": 1 + 1e-5 * len(calls)}[wrong]
        return out * factor, lse

    monkeypatch.setitem(varlen.KERNELS, "FA3", sound._replace(forward=forward))
    monkeypatch.setattr(stage, "activate", lambda kernel: None)
    monkeypatch.setattr(stage, "this_gpu", lambda: GPUS["h100"])
    record, cut = Record(tmp_path / "attention.json"), (3, 2, 1)
    given = stage.problem(cut, 9, 9, 2, 64, 4)
    labels = {"cut": "ragged", "width": 64, "queries": 9, "keys": 9}
    names = stage.compare(record, given, cut, labels, stage.contestants(given, cut, ("FA2", "FA3"), ()), 1)
    rows = {(row["kernel"], row["segments"]): row for row in record.rows}
    assert names == (["FA3 (exact)", "FA3 (padded)"] if wrong in ("NaN", "scaled") else [])
    ours = rows["FA3", "exact"]
    if wrong == "missing":
        assert ours["failed"] == "no such engine"
    else:
        assert ours["repeats"] == (wrong == "scaled")
    # Shares of the peak of right kernels only.
    right = {"fa3_spans_forward", "fa3_spans_backward"} if wrong == "other every time" else set()
    assert set(record.efficiency) == {"fa2_spans_forward", "fa2_spans_backward"} | right
    row, gpu = rows["FA2", "exact"], GPUS["h100"]
    assert record.efficiency["fa2_spans_forward"] == [pytest.approx(row["forward_tflops"] * 1e12 / gpu.peak)]
    flops = 4 * 2 * 64 * sum((9 * n) ** 2 for n in cut)
    assert row["forward_tflops"] * row["forward_ms"] == pytest.approx(flops / 1e9)
    assert row["backward_tflops"] * row["backward_ms"] == pytest.approx(2.5 * flops / 1e9)
