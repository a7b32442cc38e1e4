"""Means over steps and breaks, skipped steps, pauses."""

import pytest
import torch

from fastmum.engine.distributed import DistContext
from fastmum.engine.meter import Meter
from fastmum.engine.task import Metric, StepOutput

METRICS = {"loss": Metric(5, "views"), "depth": Metric()}


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


def test_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fastmum.engine.meter.time.perf_counter", lambda: now[0])
    meter = Meter(METRICS, DistContext())
    now[0] = 2.0
    with meter.paused():
        now[0] = 50.0
    now[0] = 51.0
    assert meter.read()[1] == pytest.approx(3)
