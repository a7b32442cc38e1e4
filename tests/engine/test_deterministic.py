"""`train.deterministic`: what it sets for CUDA, and nothing for the CPU."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.utils.deterministic

from fastmum.engine.device import make_deterministic
from fastmum.train import main


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # restored afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_cuda_only():
    before = torch.are_deterministic_algorithms_enabled()
    make_deterministic(torch.device("cpu"))
    assert torch.are_deterministic_algorithms_enabled() == before == ("CUBLAS_WORKSPACE_CONFIG" in os.environ)
    make_deterministic(torch.device("cuda", 1))
    assert torch.are_deterministic_algorithms_enabled()
    # With warnings only, torch's attention would add gradients in any order.
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


def test_an_operator_that_cannot_is_named_in_one_line(monkeypatch, capsys):
    def train(config, task):
        raise RuntimeError("upsample_backward_cuda does not have a deterministic implementation\nmore")

    monkeypatch.setattr("fastmum.train.train", train)
    assert main(["--config", "quickstart", "train.deterministic=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.deterministic" in line
    assert "upsample_backward_cuda" in line
    with pytest.raises(RuntimeError):
        main(["--config", "quickstart"])
