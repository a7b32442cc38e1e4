"""`python -m benchmarks.offline` where it cannot run, and its default number of views."""

import importlib.util
import logging

import pytest
import torch

from benchmarks.offline import report
from benchmarks.offline.__main__ import main


@pytest.fixture(autouse=True)
def _compiles(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    logging.disable(logging.NOTSET)  # which the command does for its process


def refusal(capsys, *words: str) -> str:
    """The one line."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_without_triton(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in refusal(capsys)


def test_with_a_torch_for_cpus(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in refusal(capsys)


@pytest.mark.parametrize(("frames", "views"), [(96, 12), (8, 8), (22, 11), (13, 1), (1, 1)])
def test_views_divide_the_frames(monkeypatch, capsys, frames, views):
    pytest.importorskip("triton")
    batches = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(report, "measure", lambda config, batch, *more: batches.append(batch) or {})
    assert main(["--json", "--frames", str(frames)]) == 0
    assert batches == [(frames, views, 256)]
    assert f'"views": {views},' in capsys.readouterr().out


@pytest.mark.parametrize("frames", ["0", "-5"])
def test_no_frames(capsys, frames):
    assert f"--frames is {frames}, but must be a positive multiple" in refusal(capsys, "--frames", frames)
