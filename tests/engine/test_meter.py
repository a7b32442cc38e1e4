"""The numbers of a log line: means, pauses, FLOPs, device-hours, memory."""

import numpy as np
import pytest
import torch

from fastmum.config import load_config
from fastmum.engine.distributed import DistContext
from fastmum.engine.gpus import PEAKS, peak_flops
from fastmum.engine.meter import Efficiency, Meter, paper_line
from fastmum.engine.task import Metric, StepOutput
from fastmum.model.config import PRESETS, step_flops
from fastmum.tasks.mum import MuMBatch, MuMTask

METRICS = {"loss": Metric(5, "views"), "depth": Metric()}


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("fastmum.engine.meter.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("fastmum.engine.meter.time.time", lambda: -1e9)  # it can be set back
    return now


def add(meter, losses, views, found_inf=0.0, depth=(0.0, 0.0)):
    sums, counts = torch.zeros(5), torch.zeros(5)
    for loss, view in zip(losses, views, strict=True):
        sums[view] += loss
        counts[view] += 1
    metrics = {"loss": (sums, counts), "depth": tuple(map(torch.tensor, depth))}
    output = StepOutput(sums.sum(), float(len(losses)), metrics=metrics)
    meter.add(meter.totals_of(output), torch.tensor(found_inf), len(losses))


def test_the_mean_covers_steps_before_a_break():
    meter = Meter(METRICS, DistContext())
    add(meter, [1.0] * 4, [2, 2, 2, 2], depth=(6.0, 4.0))
    resumed = Meter(METRICS, DistContext())
    resumed.load(meter.state())
    add(resumed, [2.0, 2.0, 3.0, 1.0], [3, 3, 3, 1], depth=(1.0, 3.0))
    values, _, samples, _ = resumed.read()
    assert values == pytest.approx(
        {"loss": 1.5, "loss/views_1": 1.0, "loss/views_2": 1.0, "loss/views_3": 7 / 3, "depth": 1.0}
    )
    assert samples == 4
    assert resumed.read()[0] == {"loss": None}


def test_a_skipped_step_is_not_part_of_the_mean():
    meter = Meter(METRICS, DistContext())
    add(meter, [torch.nan], [2], found_inf=1.0)
    values, _, _, others = meter.read(torch.tensor([3, 4]), torch.tensor(0.5))
    assert values["loss"] is None
    assert others == [3, 4, 0.5]
    add(meter, [torch.inf], [2], found_inf=1.0)
    add(meter, [5.0], [2])
    assert meter.read()[0]["loss"] == 5


def test_without_a_metric_the_loss_is_the_mean_of_its_terms():
    meter = Meter({}, DistContext())
    for loss_sum, weight in ((6.0, 2.0), (3.0, 4.0)):
        output = StepOutput(torch.tensor(loss_sum), torch.tensor(weight))
        meter.add(meter.totals_of(output), torch.zeros(()), 1)
    assert meter.read()[0] == {"loss": 1.5}


def test_pauses(clock):
    meter = Meter(METRICS, DistContext())
    clock[0] += 2
    with meter.paused():
        clock[0] += 48
    clock[0] += 1
    assert meter.read()[1] == pytest.approx(3)


def make(preset="mum_tiny", device="cpu", image_size=128, steps=100, world_size=1, precision="bf16", **kwargs):
    config = load_config(None, [f"model.preset={preset}", f"data.image_size={image_size}"])
    task = MuMTask(config, DistContext(size=world_size))
    task.world = DistContext(size=world_size, device=torch.device(device))  # late: there may be no such device
    return Efficiency(task, precision, steps, **kwargs)


def batch(lengths):
    return MuMBatch(None, tuple(lengths), None, None, sum(lengths))


@pytest.mark.parametrize("preset", PRESETS)
def test_operations_are_those_of_the_model(preset):
    rng = np.random.default_rng(0)
    cost, expected = make(preset, image_size=256), 0
    for _ in range(20):
        lengths = rng.integers(1, 25, rng.integers(1, 30)).tolist()
        cost.add(batch(lengths))
        expected += step_flops(PRESETS[preset], 256, 64, lengths).total
    # Every operation counts: a float of 64 bits holds 15 digits.
    assert cost.read(20, 2.0, 96)["tflops"] == pytest.approx(expected / 2 / 1e12, rel=1e-15)
    cost.add(batch([3]))
    values = cost.read(21, 2.0, 8)
    assert values["tflops"] == pytest.approx(step_flops(PRESETS[preset], 256, 64, [3]).total / 2e12, rel=1e-15)
    assert values["tokens_per_s"] == 8 * 256 / 2
    assert values["mfu"] is None
    assert 0.05 < values["memory_gb"] < 100


def test_hours_continue_and_are_projected(clock):
    cost = make(start=10, world_size=8, device_seconds=8 * 3600.0)
    clock[0] += 500  # the first step compiles
    cost.add(batch([2]))
    assert cost.read(11, 500.0, 2)["gpu_hours_projected"] is None
    for _ in range(4):
        clock[0] += 36
        cost.add(batch([2]))
    values = cost.read(15, 100.0, 8)  # less than 4 x 36: an evaluation is no training, but costs
    assert values["gpu_hours"] == pytest.approx(8 + 8 * (500 + 4 * 36) / 3600)
    assert values["gpu_hours_projected"] == pytest.approx(values["gpu_hours"] + 8 * 85 * 36 / 3600)
    before = cost.device_seconds()
    last = cost.read(100, 100.0, 8)
    assert last["gpu_hours_projected"] == last["gpu_hours"] == values["gpu_hours"]
    clock[0] = 5.0  # another machine's clock starts anywhere
    resumed = make(start=15, world_size=4, device_seconds=before)
    clock[0] += 3600
    assert resumed.read(16, 1.0, 1)["gpu_hours"] == pytest.approx(values["gpu_hours"] + 4)


def test_peaks_by_name():
    for name, tflops in {
        "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "A100-SXM4-80GB": 312, "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200 NVL": 835.5, "NVIDIA GH200 480GB": 989.4, "NVIDIA B200": 2250,
        "NVIDIA L40S": 362.05, "NVIDIA L4": 121, "NVIDIA A10": 125, "NVIDIA GeForce RTX 4090": 165.2,
        "NVIDIA RTX 6000 Ada Generation": 364.2,
    }.items():  # fmt: skip
        assert peak_flops(name, "bf16") == pytest.approx(tflops * 1e12), name
    for name in (
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G", "AMD Instinct MI300X", "Tesla V100-SXM2-32GB", "",
    ):  # fmt: skip
        assert peak_flops(name, "bf16") is None, name
    a100 = {precision: peak_flops("NVIDIA A100-SXM4-80GB", precision) for precision in ("tf32", "fp32", "fp8")}
    assert a100 == {"tf32": 156e12, "fp32": 19.5e12, "fp8": None}


def test_peaks_are_dense():
    """The rate of tensor cores doubles when the width is halved; a sparse number would break that."""
    for name, peak in PEAKS.items():
        assert peak.fp32 <= peak.tf32, name
        assert peak.bf16 / peak.tf32 == pytest.approx(2, rel=0.02), name
        assert peak.fp8 is None or peak.fp8 / peak.bf16 == pytest.approx(2, rel=0.03), name


@pytest.mark.parametrize(("matmul", "peak"), [("highest", 66.9e12), ("high", 494.7e12)])
def test_mfu_is_relative_to_the_peak_of_the_precision(monkeypatch, matmul, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5e9)
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    flops = step_flops(PRESETS["mum_tiny"], 64, 16, [8] * 12).total
    for precision, expected in (("bf16", 989.4e12), ("fp8", 1978.9e12), ("fp32", peak)):
        cost = make(device="cuda:0", precision=precision)
        cost.add(batch([8] * 12))
        values = cost.read(1, 1.0, 96)
        assert values["mfu"] == pytest.approx(flops / expected)
        assert values["memory_gb"] == 5.0
    assert resets == [torch.device("cuda:0")] * 3


def test_the_papers_hours():
    assert "64 x A100 x 3 days = 4,608 GPU-hours" in paper_line()
