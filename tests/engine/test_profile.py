import gzip
import json
import logging
import re

import pytest
import torch

from fastmum.engine.profile import StepProfiler

CPU = torch.device("cpu")


def loop(folder, window, steps, start=0, rank=0):
    """Steps of one matrix product each; returns the names of the files."""
    x = torch.eye(8)
    with StepProfiler(window, folder, CPU, start, rank) as profiler:
        for done in range(start + 1, steps + 1):
            x = x @ x
            profiler.step(done)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def events(path):
    with gzip.open(path) as file:
        return [event.get("name") for event in json.load(file)["traceEvents"]]


@pytest.mark.parametrize(
    ("window", "start", "span", "steps"),
    [
        (range(3, 5), 0, "3-4", [3, 4]),
        (range(1, 3), 0, "1-2", [1, 2]),
        (range(4, 5), 0, "4", [4]),
        (range(3, 7), 4, "5-6", [5, 6]),  # resumed in the middle
        (range(7, 20), 0, "7-8", [7, 8]),  # the run ends before
    ],
)
def test_exactly_the_steps_of_the_window(tmp_path, window, start, span, steps):
    folder = tmp_path / "profile"
    names = loop(folder, window, 8, start, rank=3)
    assert names == [f"steps_{span}_rank_3.json.gz", f"steps_{span}_rank_3.txt"]
    found = events(folder / names[0])
    labels = [name for name in found if name and name.startswith("ProfilerStep#")]
    assert labels[: len(steps)] == [f"ProfilerStep#{n}" for n in steps]  # a run that ends has begun one more
    assert found.count("aten::mm") == len(steps)
    assert "aten::mm" in (folder / names[1]).read_text()


@pytest.mark.parametrize(
    ("window", "start", "message"),
    [
        (range(3, 5), 4, "profile.steps is 3-4, but .* step 5"),
        (range(9, 12), 0, "profile.steps is 9-11, but .* step 8"),
        (range(20, 21), 0, "profile.steps is 20, but .* step 8"),
    ],
)
def test_nothing_to_profile_leaves_no_file(tmp_path, caplog, window, start, message):
    assert loop(tmp_path / "profile", window, 8, start) == []
    assert len(caplog.records) == 1
    assert re.search(message, caplog.text)


def test_a_loop_that_fails_leaves_the_steps_so_far(tmp_path):
    def fail():
        with StepProfiler(range(2, 9), tmp_path, CPU) as profiler:
            for done in range(1, 5):
                torch.eye(2) @ torch.eye(2)
                profiler.step(done)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "steps_2-4_rank_0.json.gz" in [path.name for path in tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    with caplog.at_level(logging.WARNING), StepProfiler(range(1, 2), tmp_path / "profile", CPU) as profiler:
        profiler.step(1)
        profiler.step(2)
    assert "File exists" in caplog.text


@pytest.mark.parametrize("method", ["prepare_trace", "start_trace", "stop_trace"])
def test_a_profiler_that_fails_is_a_warning(tmp_path, caplog, monkeypatch, method):
    works = getattr(torch.profiler.profile, method)

    def fail(self):
        if method == "stop_trace":  # a trace that is not stopped crashes the interpreter at exit
            works(self)
        raise RuntimeError("CUPTI is not there\nand more")

    monkeypatch.setattr(f"fastmum.engine.profile.profile.{method}", fail)
    assert loop(tmp_path / "profile", range(2, 4), 5) == []
    assert [record.message for record in caplog.records] == ["no profile: CUPTI is not there"]
