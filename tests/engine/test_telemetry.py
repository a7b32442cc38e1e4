import json

import pytest
import torch
from PIL import Image

from fastmum.engine.distributed import DistContext
from fastmum.engine.meter import Meter
from fastmum.engine.rundir import RunDir
from fastmum.engine.telemetry import Telemetry, read_metrics


class FakeLoader:
    wait_seconds = 0.0


def test_lines_and_what_a_resumed_run_drops(tmp_path):
    run = RunDir(tmp_path)
    first = Telemetry(run, 0)
    for step in (10, 20, 30):
        first.log(step, {"loss": 1 / step})
    first.close()
    with open(run.metrics, "a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    second = Telemetry(run, 20)
    second.log(30, {"loss": 0.5})
    second.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(run.metrics)] == [(10, 0.1), (20, 0.05), (30, 0.5)]
    assert all(json.loads(line) for line in run.metrics.read_text().splitlines())


def test_pictures_are_kept_and_the_newest_is_found(tmp_path):
    run = RunDir(tmp_path)
    telemetry = Telemetry(run, 0)
    for step, grey in ((1, 10), (2, 20)):
        telemetry.pictures(step, {"reconstruction": Image.new("RGB", (4, 4), (grey, grey, grey))})
    telemetry.close()
    assert Image.open(run.picture(1)).getpixel((0, 0)) == (10, 10, 10)
    assert Image.open(run.newest_picture).getpixel((0, 0)) == (20, 20, 20)


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


def test_a_step_that_was_passed_over_is_not_part_of_the_mean():
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


def test_an_old_run_is_set_aside(tmp_path):
    run = RunDir(tmp_path / "a")
    run.set_aside()
    for number in (1, 2):
        run.root.mkdir()
        run.config.write_text(str(number))
        run.set_aside()
        assert not run.root.exists()
        assert (tmp_path / f"a.old-{number}/config.yaml").read_text() == str(number)
