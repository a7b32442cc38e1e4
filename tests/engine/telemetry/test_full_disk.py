"""A disk that is really full: a file system of 64 KB in memory."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastmum.engine.rundir import RunDir, read_metrics
from fastmum.engine.telemetry import Telemetry

KB_64 = pytest.mark.parametrize("small_disk", ["64k"], indirect=True)


def fill(folder):
    """Leave no byte free."""
    path = folder / "ballast"
    with open(path, "wb", buffering=0) as file:
        size = 65536
        while size:
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                size //= 2
    return path


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@KB_64
def test_lines_wait_for_room_and_none_is_lost(small_disk, caplog):
    run = RunDir(small_disk / "run")
    caplog.set_level(logging.INFO)
    telemetry = Telemetry(run, 0)
    telemetry.pictures(1, {"reconstruction": noise(0)})
    values = {f"curve_{i}": i / 7 for i in range(20)}
    telemetry.log(1, values)
    ballast = fill(small_disk)
    # The last page has room for a few more lines, and for a part of one.
    for step in range(2, 20):
        telemetry.log(step, values)
        telemetry.pictures(step, {"reconstruction": noise(step)})
        lines = run.metrics.read_bytes().split(b"\n")
        assert lines[-1] == b"", "half a line was left"
        assert all(json.loads(line) for line in lines[:-1])
    assert len(read_metrics(run.metrics)) < 19
    paths = (run.metrics, next(run.tensorboard.iterdir()), run.picture(2))
    assert sorted(line.partition("; ")[0] for line in warnings(caplog)) == sorted(
        f"{path} cannot be written (No space left on device)" for path in paths
    )
    assert Image.open(run.newest_picture).tobytes() == noise(0).tobytes()
    assert [path.name for path in run.picture(1).parent.iterdir()] == ["step_0000001.png"]

    caplog.clear()
    ballast.unlink()
    telemetry.log(20, values)
    telemetry.pictures(20, {"reconstruction": noise(20)})
    assert [record["step"] for record in read_metrics(run.metrics)] == list(range(1, 21))
    assert any("can be written again" in record.getMessage() for record in caplog.records)
    assert Image.open(run.newest_picture).tobytes() == noise(20).tobytes()
    telemetry.close()
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert [point.step for point in board.Scalars("curve_3")] == list(range(1, 21))
    assert [image.step for image in board.Images("reconstruction")] == [1, 20]
    assert warnings(caplog) == []


@KB_64
def test_a_resumed_run_drops_lines_on_a_full_disk(small_disk):
    run = RunDir(small_disk)
    first = Telemetry(run, 0)
    for step in range(1, 30):
        first.log(step, {"loss": float(step)})
    first.close()
    fill(small_disk)
    second = Telemetry(run, 10)
    assert [record["step"] for record in read_metrics(run.metrics)] == list(range(1, 11))
    second.log(11, {"loss": 0.5})  # there is room where the dropped lines were
    second.close()
    assert read_metrics(run.metrics)[-1] == {"step": 11, "loss": 0.5}


@KB_64
def test_a_disk_that_is_full_from_the_start_and_records_lost_at_the_end(small_disk, caplog):
    run = RunDir(small_disk / "run")
    ballast = fill(small_disk)
    telemetry = Telemetry(run, 0)
    for step in (1, 2):
        telemetry.log(step, {"loss": 1.0})
    ballast.unlink()
    telemetry.log(3, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(run.metrics)] == [1, 2, 3]
    ballast = fill(small_disk)
    steps = range(4, 500)  # more than a page
    for step in steps:
        telemetry.log(step, {"loss": 1.0})
    lost = steps[-1] - read_metrics(run.metrics)[-1]["step"]
    telemetry.close()
    assert any(f"{run.metrics}: {lost} records" in line for line in warnings(caplog))


def test_a_folder_in_the_way_is_a_warning(tmp_path, caplog):
    run = RunDir(tmp_path)
    (tmp_path / "tensorboard").write_text("in the way")
    telemetry = Telemetry(run, 0)
    run.metrics.mkdir()
    telemetry.log(1, {"loss": 1.0})
    telemetry.log(2, {"loss": 1.0})
    telemetry.pictures(2, {"reconstruction": noise(0)})
    run.metrics.rmdir()
    (tmp_path / "tensorboard").unlink()
    telemetry.log(3, {"loss": 1.0})
    telemetry.close()
    assert len(warnings(caplog)) == 2
    assert any(f"{run.metrics} cannot be written (Is a directory)" in line for line in warnings(caplog))
    assert [record["step"] for record in read_metrics(run.metrics)] == [1, 2, 3]
    assert Path(run.newest_picture).exists()
