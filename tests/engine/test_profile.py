"""Profiles of a window of steps."""

import gzip
import json

import pytest
import torch

from fastmum.engine.profile import StepProfiler


def loop(folder, window, steps, start=0, rank=0, fails_after=None):
    """Steps of one matrix product each; returns the names of the files."""
    x = torch.eye(8)
    with StepProfiler(window, folder, torch.device("cpu"), start, rank) as profiler:
        for done in range(start + 1, steps + 1):
            x = x @ x
            profiler.step(done)
            if done == fails_after:
                raise ZeroDivisionError
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


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
    with gzip.open(folder / names[0]) as file:
        found = [event.get("name") for event in json.load(file)["traceEvents"]]
    labels = [name for name in found if name and name.startswith("ProfilerStep#")]
    assert labels[: len(steps)] == [f"ProfilerStep#{n}" for n in steps]  # a run that ends has begun one more
    assert found.count("aten::mm") == len(steps)
    assert "aten::mm" in (folder / names[1]).read_text()


@pytest.mark.parametrize(
    ("window", "start", "names"),
    [(range(3, 5), 4, ("3-4", "step 5")), (range(9, 12), 0, ("9-11", "step 8")), (range(20, 21), 0, ("20", "step 8"))],
)
def test_nothing_to_profile_is_a_warning(tmp_path, caplog, window, start, names):
    assert loop(tmp_path / "profile", window, 8, start) == []
    (record,) = caplog.records
    assert all(name in record.message for name in ("profile.steps", *names))


def test_a_loop_that_fails_leaves_the_steps_so_far(tmp_path):
    with pytest.raises(ZeroDivisionError):
        loop(tmp_path, range(2, 9), 8, fails_after=4)
    assert "steps_2-4_rank_0.json.gz" in [path.name for path in tmp_path.iterdir()]


@pytest.mark.parametrize("method", ["prepare_trace", "start_trace", "stop_trace"])
def test_a_profile_that_fails_is_a_warning(tmp_path, caplog, monkeypatch, method):
    (tmp_path / "in the way").touch()
    assert loop(tmp_path / "in the way", range(1, 2), 2) == []
    assert "File exists" in caplog.text
    caplog.clear()
    works = getattr(torch.profiler.profile, method)

    def fail(self):
        if method == "stop_trace":  # a trace that is not stopped crashes the interpreter at exit
            works(self)
        raise RuntimeError("no CUPTI\nand more")

    monkeypatch.setattr(f"fastmum.engine.profile.profile.{method}", fail)
    assert loop(tmp_path / "profile", range(2, 4), 5) == []
    assert [record.message for record in caplog.records] == ["no profile: no CUPTI"]
