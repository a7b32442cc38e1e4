import json

from PIL import Image

from fastmum.engine.rundir import RunDir
from fastmum.engine.telemetry import Telemetry, read_metrics


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


def test_an_old_run_is_set_aside(tmp_path):
    run = RunDir(tmp_path / "a")
    run.set_aside()
    for number in (1, 2):
        run.root.mkdir()
        run.config.write_text(str(number))
        run.set_aside()
        assert not run.root.exists()
        assert (tmp_path / f"a.old-{number}/config.yaml").read_text() == str(number)
