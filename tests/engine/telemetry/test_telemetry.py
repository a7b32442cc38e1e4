"""metrics.jsonl, TensorBoard and pictures: of new and resumed runs, and on a full disk (a tmpfs of 64 KB)."""

import json
import logging
import math
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastmum.engine.rundir import RunDir, read_metrics
from fastmum.engine.telemetry import Telemetry

FULL_DISK = pytest.mark.parametrize("small_disk", ["64k"], indirect=True)


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def strict(path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps(run):
    return [record["step"] for record in strict(run.metrics)]


def board_of(run):
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    return board


def points(run, name):
    return [(point.step, pytest.approx(point.value)) for point in board_of(run).Scalars(name)]


def log(run, start, steps, factor=1):
    telemetry = Telemetry(run, start)
    for step in steps:
        telemetry.log(step, {"loss": factor * step})
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
    assert sorted(board_of(run).Tags()["scalars"]) == ["array", "float32", "frames", "loss", "none"]
    assert points(run, "loss") == [(1, 1.0)]
    assert points(run, "none") == [(2, 4.0)]
    assert not run.metrics_cut.exists()  # nothing was cut


@pytest.mark.parametrize(
    ("resumed", "kept", "end"),
    [
        (0, [], '{"step": 40, "lo'),
        (20, [10, 20], "\x00\x00\x00"),
        (25, [10, 20], '{"step": 15}'),
        (99, [10, 20, 30], ""),
        (99, [10, 20, 30], '{"step": 40, "lo'),
    ],
)
def test_lines_after_the_step_resumed_from_are_dropped_and_copied(run, resumed, kept, end):
    for _ in range(2):
        log(run, 0, (10, 20, 30))
        with open(run.metrics, "a") as file:
            file.write(end)
        whole = run.metrics.read_bytes()
        telemetry = Telemetry(run, resumed)
        assert steps(run) == kept  # before the first new line
        cut = whole.removeprefix(run.metrics.read_bytes())
        telemetry.log(100, {"loss": 0.5})
        telemetry.close()
        assert steps(run) == [*kept, 100]
        copy = run.metrics_cut.read_bytes() if cut else b""
        assert copy.removesuffix(b"\n").endswith(cut.removesuffix(b"\n"))


@pytest.mark.parametrize(
    "junk",
    [b"", b"#", b"[1, 2]", b"3", b"{}", b'{"step": "a"}', b'{"step": null}', b"\xff\xfe", b"\x00" * 9, b"[" * 9999],
)
def test_a_line_that_is_no_record_is_skipped_but_not_what_follows(run, junk):
    log(run, 0, (10, 20))
    run.metrics.write_bytes(b"\xef\xbb\xbf" + run.metrics.read_bytes().replace(b"\n", b"\r\n" + junk + b"\n"))
    log(run, 20, (30,))
    assert [record["step"] for record in read_metrics(run.metrics)] == [10, 20, 30]
    assert run.metrics.read_bytes().count(junk + b"\n") >= 1


@pytest.mark.parametrize("clock_set_back", [False, True])
def test_tensorboard_hides_the_points_that_a_resumed_run_repeats(run, monkeypatch, clock_set_back):
    log(run, 0, (10, 20, 30))
    if clock_set_back:
        monkeypatch.setattr("fastmum.engine.telemetry.time.time", lambda: 1000.0)
    log(run, 20, (30, 40), factor=2)  # in the same second, too
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
    assert sorted(board_of(run).Tags()["images"]) == ["depth", "reconstruction"]


def test_an_old_run_is_set_aside(run):
    assert read_metrics(run.metrics) == []
    run.set_aside()
    for number in (1, 2):
        run.root.mkdir()
        run.config.write_text(str(number))
        run.set_aside()
        assert not run.root.exists()
        assert (run.root.parent / f"run.old-{number}/config.yaml").read_text() == str(number)


def test_configurations_stay_with_the_step_from_which_they_held(run):
    def kept():
        return {path.name: path.read_text() for path in run.configs.iterdir()}

    run.root.mkdir()
    run.write_config("a", 0)
    run.write_config("a", 10)
    assert kept() == {"step_0000000.yaml": "a"}
    run.write_config("b", 20)
    run.write_config("c", 30)
    assert kept() == {"step_0000000.yaml": "a", "step_0000020.yaml": "b", "step_0000030.yaml": "c"}
    run.write_config("b", 25)  # from an earlier checkpoint: b holds on, and the steps of c are done again
    assert kept() == {"step_0000000.yaml": "a", "step_0000020.yaml": "b", "step_0000030.yaml.abandoned": "c"}
    run.write_config("d", 20)
    assert kept()["step_0000020.yaml"] == run.config.read_text() == "d"
    assert kept()["step_0000020.yaml.abandoned"] == "b"
    shutil.rmtree(run.configs)  # a run of a version that kept none
    run.write_config("e", 40)
    assert kept() == {"step_0000000.yaml": "d", "step_0000040.yaml": "e"}


def fill(folder):
    """Leave no page free; returns the file that fills the disk."""
    free, path = os.statvfs(folder), folder / "ballast"
    path.write_bytes(bytes(free.f_bavail * free.f_frsize))
    return path


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@FULL_DISK
def test_lines_wait_until_there_is_space_and_none_is_lost(small_disk, caplog):
    run = RunDir(small_disk / "run")
    caplog.set_level(logging.INFO)
    telemetry = Telemetry(run, 0)
    telemetry.pictures(1, {"reconstruction": noise(0)})
    values = {f"curve_{i}": i / 7 for i in range(20)}
    telemetry.log(1, values)
    ballast = fill(small_disk)
    for step in range(2, 20):  # the last page of the file takes some of these lines and a part of one
        telemetry.log(step, values)
        telemetry.pictures(step, {"reconstruction": noise(step)})
        assert run.metrics.read_bytes().endswith(b"\n"), "a partial line was left"
        assert steps(run) == list(range(1, steps(run)[-1] + 1))
    assert len(steps(run)) < 19
    paths = (run.metrics, next(run.tensorboard.iterdir()), run.picture(2))
    assert sorted(line.partition(" ")[0] for line in warnings(caplog)) == sorted(map(str, paths))
    assert all("No space left on device" in line for line in warnings(caplog))
    assert Image.open(run.newest_picture).tobytes() == noise(0).tobytes()
    assert [path.name for path in run.picture(1).parent.iterdir()] == ["step_0000001.png"]

    caplog.clear()
    ballast.unlink()
    telemetry.log(20, values)
    telemetry.pictures(20, {"reconstruction": noise(20)})
    assert steps(run) == list(range(1, 21))
    assert any("again" in record.getMessage() for record in caplog.records)
    assert Image.open(run.newest_picture).tobytes() == noise(20).tobytes()
    telemetry.close()
    assert [step for step, _ in points(run, "curve_3")] == list(range(1, 21))
    assert [image.step for image in board_of(run).Images("reconstruction")] == [1, 20]
    assert warnings(caplog) == []


@FULL_DISK
def test_a_run_starts_ends_and_resumes_on_a_full_disk(small_disk, caplog):
    run = RunDir(small_disk / "run")
    ballast = fill(small_disk)
    telemetry = Telemetry(run, 0)
    for step in range(1, 501):
        if step == 3:
            ballast.unlink()
        telemetry.log(step, {"loss": 1.0})
        if step == 3:
            assert steps(run) == [1, 2, 3]
            fill(small_disk)
    lost = 500 - steps(run)[-1]
    telemetry.close()
    assert any(f"{run.metrics}: {lost} records" in line for line in warnings(caplog))
    telemetry = Telemetry(run, 10)
    assert steps(run) == list(range(1, 11))
    telemetry.log(11, {"loss": 0.5})  # in the space of the dropped lines
    telemetry.close()
    assert read_metrics(run.metrics)[-1] == {"step": 11, "loss": 0.5}


def test_a_path_of_another_type_is_a_warning_and_lines_wait(run, caplog):
    run.root.mkdir()
    run.tensorboard.write_text("in the way")
    telemetry = Telemetry(run, 0)
    run.metrics.mkdir()
    for step in (1, 2):
        telemetry.log(step, {"loss": 1.0})
    telemetry.pictures(2, {"reconstruction": noise(0)})
    run.metrics.rmdir()
    run.tensorboard.unlink()
    telemetry.log(3, {"loss": 1.0})
    telemetry.close()
    assert len(warnings(caplog)) == 2
    assert any(line.startswith(str(run.metrics)) for line in warnings(caplog))
    assert steps(run) == [1, 2, 3]
    assert run.newest_picture.exists()
