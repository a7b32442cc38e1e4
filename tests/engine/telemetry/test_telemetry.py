"""metrics.jsonl, TensorBoard and pictures, of new and resumed runs."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastmum.engine.rundir import RunDir, read_metrics
from fastmum.engine.telemetry import Telemetry


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def strict(path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def points(run, name):
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    return [(point.step, pytest.approx(point.value)) for point in board.Scalars(name)]


def log(run, start, steps, value):
    telemetry = Telemetry(run, start)
    for step in steps:
        telemetry.log(step, {"loss": value(step)})
        assert read_metrics(run.metrics)[-1]["step"] == step, "lines are written at once"
    telemetry.close()


def test_values_that_are_not_finite_are_null_and_no_point(run):
    telemetry = Telemetry(run, 0)
    odd = {"none": None, "nan": math.nan, "inf": -math.inf, "float32": np.float32(0.5), "array": np.array(3.0)}
    telemetry.log(1, {"loss": 1.0, "frames": 12, **odd})
    telemetry.log(2, {"loss": np.float64("nan"), "none": 4.0})
    telemetry.close()
    assert strict(run.metrics) == [
        {"step": 1, "loss": 1.0, "frames": 12, "none": None, "nan": None, "inf": None, "float32": 0.5, "array": 3.0},
        {"step": 2, "loss": None, "none": 4.0},
    ]
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["array", "float32", "frames", "loss", "none"]
    assert points(run, "loss") == [(1, 1.0)]
    assert points(run, "none") == [(2, 4.0)]


@pytest.mark.parametrize(
    ("resumed", "kept", "cut"),
    [
        (0, [], '{"step": 40, "lo'),
        (20, [10, 20], "\x00\x00\x00"),
        (25, [10, 20], '{"step": 15}'),
        (99, [10, 20, 30], ""),
        (99, [10, 20, 30], '{"step": 40, "lo'),
    ],
)
def test_lines_after_the_step_resumed_from_are_dropped(run, resumed, kept, cut):
    log(run, 0, (10, 20, 30), lambda step: step)
    with open(run.metrics, "a") as file:
        file.write(cut)
    telemetry = Telemetry(run, resumed)
    assert [record["step"] for record in strict(run.metrics)] == kept  # before the first new line
    telemetry.log(100, {"loss": 0.5})
    telemetry.close()
    assert [record["step"] for record in strict(run.metrics)] == [*kept, 100]


@pytest.mark.parametrize("clock_set_back", [False, True])
def test_tensorboard_hides_the_points_that_a_resumed_run_repeats(run, monkeypatch, clock_set_back):
    log(run, 0, (10, 20, 30), lambda step: step)
    if clock_set_back:
        monkeypatch.setattr("fastmum.engine.telemetry.time.time", lambda: 1000.0)
    log(run, 20, (30, 40), lambda step: 2 * step)  # in the same second, too
    assert points(run, "loss") == [(10, 10), (20, 20), (30, 60), (40, 80)]


def test_pictures_by_name_and_the_newest(run):
    telemetry = Telemetry(run, 0)
    for step in (1, 2):
        for name in ("reconstruction", "depth"):
            telemetry.pictures(step, {name: Image.new("RGB", (4, 4), (step, step, len(name)))})
    telemetry.close()
    seen = {str(path.relative_to(run.root)): Image.open(path).getpixel((0, 0)) for path in run.root.rglob("*.png")}
    assert seen == {
        "pictures/step_0000001.png": (1, 1, 14), "pictures/step_0000002.png": (2, 2, 14),
        "pictures/depth_0000001.png": (1, 1, 5), "pictures/depth_0000002.png": (2, 2, 5),
        "reconstruction.png": (2, 2, 14), "depth.png": (2, 2, 5),
    }  # fmt: skip
    assert run.newest_picture.exists()
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert sorted(board.Tags()["images"]) == ["depth", "reconstruction"]


def test_an_old_run_is_set_aside(run):
    assert read_metrics(run.metrics) == []
    run.set_aside()
    for number in (1, 2):
        run.root.mkdir()
        run.config.write_text(str(number))
        run.set_aside()
        assert not run.root.exists()
        assert (run.root.parent / f"run.old-{number}/config.yaml").read_text() == str(number)
