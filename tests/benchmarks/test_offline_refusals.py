"""Errors of `python -m benchmarks.offline`, and its views if only the frames are given."""

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
    logging.disable(logging.NOTSET)  # the command disables it for its process


def refusal(capsys, *words: str) -> str:
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


@pytest.mark.parametrize(("frames", "views"), [(96, 12), (22, 11), (13, 1)])
def test_views_divide_the_frames(monkeypatch, capsys, frames, views):
    pytest.importorskip("triton")
    batches = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(report, "measure", lambda config, batch, *more: batches.append(batch) or {})
    assert main(["--json", "--frames", str(frames)]) == 0
    assert batches == [(frames, views, 256)]
    assert f'"views": {views},' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [("--frames 0", "--frames is 0"), ("--frames 10 --views 4", "--frames is 10"),
     ("--record --frames 8", "--record"), ("--model mum_huge", "mum_huge")],
)  # fmt: skip
def test_invalid_arguments(capsys, words, named):
    assert named in refusal(capsys, *words.split())
