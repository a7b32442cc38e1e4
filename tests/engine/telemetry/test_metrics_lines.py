import json
import math

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastmum.engine.rundir import RunDir
from fastmum.engine.telemetry import Telemetry, read_metrics


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def points(run, name):
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    return [(point.step, pytest.approx(point.value)) for point in board.Scalars(name)]


def tell(run, start, steps, value):
    telemetry = Telemetry(run, start)
    for step in steps:
        telemetry.log(step, {"loss": value(step)})
    telemetry.close()


def test_what_is_no_number_is_null_in_json_and_no_point(tmp_path):
    run = RunDir(tmp_path)
    telemetry = Telemetry(run, 0)
    odd = {"none": None, "nan": math.nan, "inf": -math.inf, "float32": np.float32(0.5), "array": np.array(3.0)}
    telemetry.log(1, {"loss": 1.0, "frames": 12, **odd})
    telemetry.log(2, {"loss": np.float64("nan"), "none": 4.0})
    telemetry.close()
    expected = {"none": None, "nan": None, "inf": None, "float32": 0.5, "array": 3.0}
    assert strict(run.metrics.read_text()) == [
        {"step": 1, "loss": 1.0, "frames": 12, **expected},
        {"step": 2, "loss": None, "none": 4.0},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["array", "float32", "frames", "loss", "none"]
    assert points(run, "loss") == [(1, 1.0)]
    assert points(run, "none") == [(2, 4.0)]


@pytest.mark.parametrize("cut", ["", '{"step": 40, "lo', "\x00\x00\x00", '{"step": 15}'])
@pytest.mark.parametrize(("resumed", "kept"), [(0, []), (20, [10, 20]), (25, [10, 20]), (99, [10, 20, 30])])
def test_lines_after_the_step_resumed_from_are_dropped(tmp_path, resumed, kept, cut):
    run = RunDir(tmp_path)
    tell(run, 0, (10, 20, 30), lambda step: step)
    with open(run.metrics, "a") as file:
        file.write(cut)
    telemetry = Telemetry(run, resumed)
    assert [record["step"] for record in strict(run.metrics.read_text())] == kept  # before the first new line
    telemetry.log(100, {"loss": 0.5})
    telemetry.close()
    assert [record["step"] for record in strict(run.metrics.read_text())] == [*kept, 100]
    assert read_metrics(run.metrics)[-1] == {"step": 100, "loss": 0.5}


def test_the_board_forgets_what_a_resumed_run_repeats(tmp_path):
    run = RunDir(tmp_path)
    tell(run, 0, (10, 20, 30), lambda step: step)
    tell(run, 20, (30, 40), lambda step: 2 * step)  # in the same second, too
    assert points(run, "loss") == [(10, 10), (20, 20), (30, 60), (40, 80)]


def test_a_clock_that_was_set_back_does_not_order_the_boards_files(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    tell(run, 0, (10, 20, 30), lambda step: step)
    monkeypatch.setattr("fastmum.engine.telemetry.time.time", lambda: 1000.0)
    tell(run, 20, (30, 40), lambda step: 2 * step)
    assert points(run, "loss") == [(10, 10), (20, 20), (30, 60), (40, 80)]


def test_lines_are_there_at_once(tmp_path):
    run = RunDir(tmp_path)
    telemetry = Telemetry(run, 0)
    telemetry.log(1, {"loss": 1.0})
    assert read_metrics(run.metrics) == [{"step": 1, "loss": 1.0}]
    telemetry.close()


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
