"""The decoder that a name selects."""

import pytest
import torch

from fastmum.data import decode
from fastmum.data.decode import PillowDecoder, make_decoder
from fastmum.data.errors import DataError


def test_wrong_names_and_missing_dali_are_refused(monkeypatch):
    with pytest.raises(DataError, match=r"data.decoder is 'turbo'.* dali_cpu"):
        make_decoder("turbo", 64)
    monkeypatch.setattr(decode, "_has_dali", lambda: False)
    for name in ("dali", "dali_cpu"):
        with pytest.raises(DataError, match=rf"data.decoder is '{name}'.*pip install 'fastmum\[dali\]'"):
            make_decoder(name, 64, "cuda")


def test_auto_without_dali_or_gpu_is_pillow(monkeypatch, caplog):
    on_cpu = make_decoder("auto", 64)
    assert not caplog.text
    monkeypatch.setattr(decode, "_has_dali", lambda: False)
    on_gpu = make_decoder("auto", 64, "cuda:0")
    assert type(on_cpu) is type(on_gpu) is PillowDecoder
    assert (on_cpu.pin_memory, on_gpu.pin_memory) == (False, True)
    assert "pip install 'fastmum[dali]'" in caplog.text


def test_dali_by_name():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from fastmum.data.decode.dali import DaliCpuDecoder, DaliGpuDecoder

    assert isinstance(make_decoder("dali_cpu", 64), DaliCpuDecoder)
    with pytest.raises(DataError, match="the run is on 'cpu'"):
        make_decoder("dali", 64)
    for name in ("dali", "auto"):
        decoder = make_decoder(name, 64, "cuda:1")
        assert isinstance(decoder, DaliGpuDecoder)
        assert decoder.device == torch.device("cuda", 1)
