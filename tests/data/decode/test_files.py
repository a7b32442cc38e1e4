"""All kinds of image files, orientations and damage, every decoder alike; the cache and the choice of a decoder."""

import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastmum.data import decode
from fastmum.data.decode import PillowDecoder, make_decoder
from fastmum.data.decode.image import KEPT, jpeg_scale, whole_frames
from fastmum.data.errors import DataError

KINDS = {
    "jpg": ["RGB", "L", "CMYK"],
    "png": ["RGB", "L", "P", "RGBA", "LA", "I;16"],
    "webp": ["RGB", "L", "RGBA"],
    "tif": ["RGB", "L", "I;16"],
    "gif": ["P"],
}
JPEGS = [{"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}]


def in_mode(photograph, mode):
    if mode == "I;16":
        return Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257)
    image = photograph.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize("suffix", KINDS)
def test_kinds_of_images(decoder, photograph, save, check, suffix):
    files = [save(f"{mode}.{suffix}", in_mode(photograph, mode), lossless=True) for mode in KINDS[suffix]]
    files += [save(f"{i}.jpg", **options) for i, options in enumerate(JPEGS)] if suffix == "jpg" else []
    frames = check(decoder, files * 4)
    assert frames.float().std() > 20, "a picture, not a plain area"


def test_photographs_are_turned_upright(decoder, save, check):
    check(decoder, [save(f"{o}.{suffix}", orientation=o) for suffix in ("jpg", "png", "webp") for o in range(1, 9)] * 2)


def test_images_smaller_than_a_frame(decoder, photograph, save, check):
    sizes = [(1, 1), (1, 9), (9, 1), (3, 2), (63, 65)]
    files = [save(f"{i}.jpg", photograph.resize(size)) for i, size in enumerate(sizes)]
    check(decoder, files * 3, tolerance=1)


def break_file(file, how):
    whole = file.read_bytes()
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how != "missing":
        size = whole.find(b"\xff\xc0") + 5
        broken = {
            "empty": b"",
            "truncated": whole[: len(whole) // 2],
            "without its end": whole[:-20],
            "text": b"not an image",
            "a bomb": whole[:size] + struct.pack(">HH", 60_000, 60_000) + whole[size + 4 :],  # pixels, says the header
            "bad pixels": whole[:2000] + bytes(400) + whole[2400:],  # header and end are intact
        }
        file.write_bytes(broken[how])


DAMAGE = {
    "jpg": {"truncated": "truncated", "without its end": "truncated", "missing": "missing", "empty": "empty"}
    | {"text": "not an image", "a folder": "directory", "a bomb": "decompression bomb"},
    "png": {"truncated": "truncated", "without its end": "truncated", "bad pixels": ""},
    "webp": {"truncated": "truncated", "without its end": "truncated"},
}


@pytest.mark.parametrize("suffix", DAMAGE)
def test_broken_files_are_detected_and_spare_the_others(decoder, save, suffix):
    reasons = DAMAGE[suffix]
    files = [save(f"{i}.{suffix}") for i in range(2 * len(reasons) + 1)]
    crops, flips = whole_frames(len(files)), np.zeros(len(files), bool)
    intact = decoder.decode(files, crops, flips).frames
    for file, how in zip(files[1::2], reasons, strict=True):
        break_file(file, how)
    frames, bad = decoder.decode(files, crops, flips)
    assert list(bad) == list(range(1, len(files), 2))
    for found, reason in zip(bad.values(), reasons.values(), strict=True):
        assert reason in found
    assert torch.equal(frames[::2], intact[::2])


def test_jpegs_with_flipped_bytes_never_raise(tmp_path, decoder, save):
    whole = save("a.jpg").read_bytes()
    files = [tmp_path / f"{seed}.jpg" for seed in range(5)]
    for seed, file in enumerate(files):
        content, rng = bytearray(whole), np.random.default_rng(seed)
        content[2:-2] = [b ^ int(rng.integers(256)) if rng.random() < 0.005 else b for b in content[2:-2]]
        file.write_bytes(content)
    frames, bad = decoder.decode(files, whole_frames(5), np.zeros(5, bool))
    assert len(frames) == 5
    assert set(bad) <= set(range(5))


def test_the_end_of_a_jpeg_is_neither_that_of_the_file_nor_that_of_a_thumbnail(decoder, photograph, save):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x927C] = save("small.jpg", photograph.resize((32, 24))).read_bytes()  # the maker's note
    file = save("a.jpg", exif=exif)
    whole = file.read_bytes()
    assert whole.count(b"\xff\xd9") == 2

    def decoded(content):
        file.write_bytes(content)
        return decoder.decode([file], whole_frames(1), np.zeros(1, bool))

    longer = decoded(whole + b"trailer" * 500)
    assert not longer.bad
    assert torch.equal(decoded(whole).frames, longer.frames)
    assert decoded(whole[: len(whole) * 3 // 4]).bad == {0: "truncated"}


def test_files_that_dali_fails_on_are_decoded_by_pillow(save, check):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    decoder = make_decoder("dali_cpu", 64)
    files = [save(f"{i}.png") for i in range(20)]
    png = files[7].read_bytes()
    begin = png.index(b"IDAT")
    end = begin + 4 + struct.unpack(">I", png[begin - 4 : begin])[0]
    files[7].write_bytes(png[:end] + struct.pack(">I", zlib.crc32(png[begin:end]) ^ 1) + png[end + 4 :])
    for _ in range(2):  # the second time the file is known
        check(decoder, files)


SHARED_SCENES = ["street_lund", "fox", "british_museum", "drone_brighton", "hololens_office", "sacre_coeur"]
SKIMAGE = ["astronaut", "coffee", "chelsea", "rocket", "camera", "brick", "grass", "gravel", "moon"]


@pytest.mark.parametrize(("origin", "size"), [("skimage", 48), ("shared", 96)])
def test_decoders_agree_on_photographs(request, save, draw, distance, check, origin, size):
    """For frames of 48 pixels Pillow decodes most of these files scaled."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    if origin == "shared":
        scenes = request.getfixturevalue("shared") / "data" / "scenes"
        files = [file for scene in SHARED_SCENES for file in sorted((scenes / scene).glob("*.jpg"))[:4]]
    else:
        images = [Image.fromarray(getattr(skimage.data, name)()) for name in SKIMAGE]
        files = [save(f"{i}.{s}", image, quality=92) for s in ("jpg", "png") for i, image in enumerate(images)]
        files.append(save("large.jpg", images[-1].resize((2600, 2600)), quality=92))
    dali = check(make_decoder("dali_cpu", size), files)
    pillow = make_decoder("pillow", size).decode(files, *draw(len(files)))
    assert not pillow.bad
    by_file = {f.name: distance(a, b) for f, a, b in zip(files, pillow.frames, dali, strict=True)}
    assert max(by_file.values()) <= 2, by_file


def test_decoding_stays_in_its_thread(decoder, photograph, save, draw):
    """Thread pools of torch or DALI for each loader thread would compete with training."""
    files = [save("a.jpg", photograph.resize((1200, 900)), 6), save("b.png")] * 4
    crops, flips = draw(8)
    decoder.decode(files, crops, flips)  # DALI's one thread a pipeline starts here

    def work():
        before = os.listdir("/proc/self/task")
        for _ in range(3):
            decoder.decode(files, crops, flips)
        return before, os.listdir("/proc/self/task")

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    with ThreadPoolExecutor(1) as pool:
        before, after = pool.submit(work).result()
    torch.set_num_threads(threads)
    assert len(before) == len(after)


@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), size=st.integers(1, 1024))
def test_scaled_decoding_keeps_pixels_for_the_frame(width, height, size):
    scale = jpeg_scale(width, height, size)
    assert scale in (1, 2, 4, 8)
    assert scale == 1 or min(width, height) / scale >= KEPT * size
    assert scale == 8 or min(width, height) / (2 * scale) < KEPT * size, "a smaller one would do"


def test_images_that_fit_are_read_once_and_nothing_else_changes(save, photograph, draw, monkeypatch):
    read, reads = decode.read_file, []
    monkeypatch.setattr(decode, "read_file", lambda file: reads.append(file.name) or read(file))
    files = [save(f"{i}.png", photograph.rotate(10 * i), 1 + i) for i in range(6)]
    one_image = 3 * photograph.width * photograph.height
    crops, flips = draw(6)
    plain = PillowDecoder(32).decode(files, crops, flips).frames
    for room, expected in ((10 * one_image, 6), (2 * one_image + 1, 6 + 4), (one_image - 1, 12)):
        decoder = PillowDecoder(32, cache_bytes=room)
        reads.clear()
        for _ in range(2):
            assert torch.equal(decoder.decode(files, crops, flips).frames, plain)
        assert len(reads) == expected

    # A frame must not depend on what was decoded before, so JPEGs that may be decoded scaled are not cached.
    files = save("large.jpg"), save("small.jpg", photograph.resize((4 * 32 - 1, 4 * 32)))
    decoder = PillowDecoder(32, cache_bytes=10**9)
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
