import pytest
import torch

from fastmum.engine.distributed import DistContext
from fastmum.engine.meter import Meter


class FakeLoader:
    wait_seconds = 0.0


def test_the_mean_covers_steps_before_a_break():
    meter = Meter(DistContext(), FakeLoader())
    add(meter, [1.0] * 4, [2, 2, 2, 2])
    resumed = Meter(DistContext(), FakeLoader())
    resumed.load(meter.state())
    add(resumed, [2.0, 2.0, 3.0, 1.0], [3, 3, 3, 1])
    values, _, frames, _ = resumed.read()
    assert values["loss"] == pytest.approx(1.5)
    assert {name: values[name] for name in values if "views" in name} == pytest.approx(
        {"loss/views_1": 1.0, "loss/views_2": 1.0, "loss/views_3": 7 / 3}
    )
    assert frames == 4
    add(resumed, [7.0], [300])
    assert resumed.read()[0]["loss/views_256"] == 7, "longer sequences are counted as these"


def test_a_skipped_step_is_not_part_of_the_mean():
    meter = Meter(DistContext(), FakeLoader())
    add(meter, [torch.nan], [2], found_inf=1.0)
    values, _, _, (other,) = meter.read(torch.tensor([3, 4]))
    assert values["loss"] is None
    assert other == [3, 4]
    add(meter, [torch.inf], [2], found_inf=1.0)
    add(meter, [5.0], [2])
    assert meter.read()[0]["loss"] == 5


def add(meter, losses, views, found_inf=0.0):
    totals = meter.totals_of(torch.tensor(losses), torch.tensor(views))
    meter.add(totals, torch.tensor(found_inf), len(losses))


def test_waiting_and_pauses(monkeypatch):
    now, loader = [0.0], FakeLoader()
    monkeypatch.setattr("fastmum.engine.meter.time.perf_counter", lambda: now[0])
    meter = Meter(DistContext(), loader)
    add(meter, [1.0] * 30, [2] * 30)
    now[0], loader.wait_seconds = 2.0, 0.5
    with meter.paused():
        now[0] = 50.0
    now[0] = 51.0
    values, seconds, _, _ = meter.read()
    assert seconds == pytest.approx(3)
    assert values["frames_per_s"] == pytest.approx(10)
    assert values["data_wait"] == pytest.approx(0.5 / 3)
