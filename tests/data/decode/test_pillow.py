"""Scaled decoding, the cache, and the decoder that a name selects."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmum.data import decode
from fastmum.data.decode import PillowDecoder, make_decoder
from fastmum.data.decode.image import KEPT, jpeg_scale, whole_frames
from fastmum.data.errors import DataError

SIZE = 32


@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), size=st.integers(1, 1024))
def test_scaled_decoding_keeps_pixels_for_the_frame(width, height, size):
    scale = jpeg_scale(width, height, size)
    assert scale in (1, 2, 4, 8)
    assert scale == 1 or min(width, height) / scale >= KEPT * size
    assert scale == 8 or min(width, height) / (2 * scale) < KEPT * size, "a smaller one would do"


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that were read, in order."""
    files = []
    read = decode.read_file
    monkeypatch.setattr(decode, "read_file", lambda file: files.append(file.name) or read(file))
    return files


def test_images_that_fit_are_read_once_and_nothing_else_changes(save, photograph, reads, draw):
    files = [save(f"{i}.png", photograph.rotate(10 * i), 1 + i) for i in range(6)]
    one_image = 3 * photograph.width * photograph.height
    crops, flips = draw(6)
    plain = PillowDecoder(SIZE).decode(files, crops, flips).frames
    for room, expected in ((10 * one_image, 6), (2 * one_image + 1, 6 + 4), (one_image - 1, 12)):
        decoder = PillowDecoder(SIZE, cache_bytes=room)
        reads.clear()
        for _ in range(2):
            assert torch.equal(decoder.decode(files, crops, flips).frames, plain)
        assert len(reads) == expected


def test_jpegs_that_may_be_decoded_scaled_are_not_cached(save, photograph, reads):
    """A frame must not depend on what was decoded before."""
    files = save("large.jpg"), save("small.jpg", photograph.resize((4 * SIZE - 1, 4 * SIZE)))
    decoder = PillowDecoder(SIZE, cache_bytes=10**9)
    for _ in range(3):
        decoder.decode(files, whole_frames(2), np.zeros(2, bool))
    assert reads.count("large.jpg") == 3
    assert reads.count("small.jpg") == 1


def test_decoders_without_dali(monkeypatch, caplog):
    on_cpu = make_decoder("auto", 64)
    assert not caplog.text
    monkeypatch.setattr(decode, "_has_dali", lambda: False)
    on_gpu = make_decoder("auto", 64, "cuda:0")
    assert type(on_cpu) is type(on_gpu) is PillowDecoder
    assert (on_cpu.pin_memory, on_gpu.pin_memory) == (False, True)
    assert "fastmum[dali]" in caplog.text
    for name, message in (("turbo", "dali_cpu"), ("dali", r"fastmum\[dali\]"), ("dali_cpu", r"fastmum\[dali\]")):
        with pytest.raises(DataError, match=f"data.decoder is '{name}'.*{message}"):
            make_decoder(name, 64, "cuda")


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
