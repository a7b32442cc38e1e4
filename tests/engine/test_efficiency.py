import time

import numpy as np
import pytest
import torch

from fastmum.config import load_config
from fastmum.engine.distributed import DistContext
from fastmum.engine.gpus import PAPER_RUNS, PEAKS, peak_flops
from fastmum.engine.meter import Efficiency, paper_line
from fastmum.model.config import PRESETS, step_flops
from fastmum.tasks.mum import MuMBatch, MuMTask

CPU = torch.device("cpu")
TINY = PRESETS["mum_tiny"]


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("fastmum.engine.meter.time.perf_counter", lambda: now[0])
    return now


def make(preset="mum_tiny", device=CPU, image_size=128, steps=100, world_size=1, precision="bf16", **kwargs):
    config = load_config(None, [f"model.preset={preset}", f"data.image_size={image_size}"])
    task = MuMTask(config, DistContext(size=world_size))
    task.world = DistContext(size=world_size, device=device)  # after tensors were made: there may be no such device
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
    assert cost.read(21, 1.0, 3)["tflops"] == pytest.approx(
        step_flops(PRESETS[preset], 256, 64, [3]).total / 1e12, rel=1e-15
    )


def test_hours_go_on_and_are_projected(clock):
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
    clock[0] = 5.0  # another machine's clock starts anywhere
    resumed = make(start=15, world_size=4, device_seconds=before)
    clock[0] += 3600
    assert resumed.read(16, 1.0, 1)["gpu_hours"] == pytest.approx(values["gpu_hours"] + 4)


def test_at_the_end_projection_and_cost_are_one(clock):
    cost = make(steps=3)
    for _ in range(3):
        clock[0] += 10
        cost.add(batch([2]))
    values = cost.read(3, 30.0, 6)
    assert values["gpu_hours_projected"] == values["gpu_hours"] == pytest.approx(30 / 3600)


def test_a_clock_that_is_set_back_changes_nothing(monkeypatch):
    cost = make()
    monkeypatch.setattr(time, "time", lambda: -1e9)
    cost.add(batch([2]))
    cost.add(batch([2]))
    values = cost.read(2, 1.0, 4)
    assert 0 < values["gpu_hours"] < 1
    assert values["gpu_hours"] <= values["gpu_hours_projected"] < 10


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", "bf16", 312), ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100-PCIE-40GB", "bf16", 312), ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("A100-SXM4-80GB", "bf16", 312), ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9), ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5), ("NVIDIA H200", "bf16", 989.4), ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "bf16", 989.4), ("NVIDIA B200", "bf16", 2250), ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121), ("NVIDIA A10", "bf16", 125), ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
    ],
)  # fmt: skip
def test_peaks_by_name(name, precision, tflops):
    assert peak_flops(name, precision) == pytest.approx(tflops * 1e12)


def test_other_devices_have_no_peak():
    names = (
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G", "AMD Instinct MI300X", "Tesla V100-SXM2-32GB", "",
    )  # fmt: skip
    assert not any(peak_flops(name, "bf16") for name in names)
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None, "no 8-bit floats before Ada"


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_are_dense_and_keep_their_order(name):
    peak = PEAKS[name]
    assert peak.fp32 <= peak.tf32 < peak.bf16 < (peak.fp8 or 1e9)
    # Tensor cores halve and double with the width; a sparse number among dense ones would break that.
    assert peak.bf16 / peak.tf32 == pytest.approx(2, rel=0.02)
    assert peak.fp8 is None or peak.fp8 / peak.bf16 == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize(("matmul", "peak"), [("highest", 66.9e12), ("high", 494.7e12)])
def test_mfu_is_held_against_what_the_products_use(monkeypatch, matmul, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5e9)
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    cuda = torch.device("cuda:0")
    costs = {precision: make(device=cuda, precision=precision) for precision in ("bf16", "fp32", "fp8")}
    read = {}
    for precision, cost in costs.items():
        cost.add(batch([8] * 12))
        read[precision] = cost.read(1, 1.0, 96)
    flops = step_flops(TINY, 64, 16, [8] * 12).total
    assert read["bf16"]["mfu"] == pytest.approx(flops / 989.4e12)
    assert read["fp8"]["mfu"] == pytest.approx(flops / 1978.9e12)
    assert read["fp32"]["mfu"] == pytest.approx(flops / peak)
    assert read["bf16"]["memory_gb"] == 5.0
    assert resets == [cuda] * 3


def test_on_a_cpu_there_is_memory_and_no_mfu():
    cost = make()
    cost.add(batch([2]))
    values = cost.read(1, 2.0, 8)
    assert values["tokens_per_s"] == 8 * 64 / 2
    assert values["mfu"] is None
    assert 0.05 < values["memory_gb"] < 100


def test_the_papers_hours():
    assert [run.gpu_hours for run in PAPER_RUNS] == [4608, 2304]
    assert "64 x A100 x 3 days = 4,608 GPU-hours" in paper_line()
    assert "Table 12" in paper_line()
