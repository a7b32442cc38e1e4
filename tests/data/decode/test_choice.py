"""Which decoder a name stands for."""

import importlib.util
import logging

import pytest
import torch

from fastmum.data import decode
from fastmum.data.decode import DECODERS, PillowDecoder, make_decoder
from fastmum.data.errors import DataError


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setattr(decode, "_has_dali", lambda: False)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(DataError, match=f"'turbo', but must be one of {', '.join(DECODERS)}"):
        make_decoder("turbo", 64)


@pytest.mark.parametrize("name", ["dali", "dali_cpu"])
@pytest.mark.usefixtures("no_dali")
def test_dali_that_is_absent_is_named_with_the_way_to_install_it(name):
    with pytest.raises(DataError, match=rf"'{name}', but DALI is not installed: pip install 'fastmum\[dali\]'"):
        make_decoder(name, 64, "cuda")


@pytest.mark.usefixtures("no_dali")
def test_auto_on_a_gpu_without_dali_is_pillow_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        decoder = make_decoder("auto", 64, "cuda:0")
    assert isinstance(decoder, PillowDecoder)
    assert decoder.pin_memory
    assert "pip install 'fastmum[dali]'" in caplog.text


def test_auto_on_a_cpu_is_pillow(caplog):
    decoder = make_decoder("auto", 64)
    assert isinstance(decoder, PillowDecoder)
    assert not decoder.pin_memory
    assert not caplog.text


@pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="DALI is not installed")
def test_dali_by_name():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from fastmum.data.decode.dali import DaliCpuDecoder, DaliGpuDecoder

    assert isinstance(make_decoder("dali_cpu", 64), DaliCpuDecoder)
    with pytest.raises(DataError, match="decodes on a GPU, but the run is on 'cpu'"):
        make_decoder("dali", 64)
    for name in ("dali", "auto"):
        decoder = make_decoder(name, 64, "cuda:1")
        assert isinstance(decoder, DaliGpuDecoder)
        assert decoder.device == torch.device("cuda", 1)
