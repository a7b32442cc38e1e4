"""Images that are kept in memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmum.data.crops import whole_frames
from fastmum.data.decode import PillowDecoder, pillow
from fastmum.data.decode.image import ORIENTATION

SIZE = 32


@pytest.fixture
def reads(monkeypatch):
    """Files that were read, in order."""
    files = []
    read = pillow.read_file
    monkeypatch.setattr(pillow, "read_file", lambda file: files.append(file.name) or read(file))
    return files


def test_images_that_fit_are_read_once_and_nothing_else_changes(tmp_path, photograph, reads, draw):
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for i, file in enumerate(files):
        photograph.rotate(10 * i).save(file, exif=_turned(1 + i))
    one_image = 3 * photograph.width * photograph.height
    crops, flips = draw(6)
    plain = PillowDecoder(SIZE).decode(files, crops, flips).frames
    for room, expected in ((10 * one_image, 6), (2 * one_image + 1, 6 + 4), (one_image - 1, 12)):
        decoder = PillowDecoder(SIZE, cache_bytes=room)
        reads.clear()
        for _ in range(2):
            assert torch.equal(decoder.decode(files, crops, flips).frames, plain)
        assert len(reads) == expected


def test_jpegs_that_may_be_decoded_scaled_are_not_kept(tmp_path, photograph, reads):
    """Or the frame would depend on what was decoded before."""
    photograph.save(tmp_path / "large.jpg")
    photograph.resize((4 * SIZE - 1, 4 * SIZE)).save(tmp_path / "small.jpg")
    decoder = PillowDecoder(SIZE, cache_bytes=10**9)
    for _ in range(3):
        decoder.decode([tmp_path / "large.jpg", tmp_path / "small.jpg"], whole_frames(2), np.zeros(2, bool))
    assert reads.count("large.jpg") == 3
    assert reads.count("small.jpg") == 1


def _turned(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif
