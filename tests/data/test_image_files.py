"""Damaged, cut and unusual image files, every decoder alike."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastmum.data.builders.base import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from fastmum.data.decode.image import FORMATS, is_cut, whole_frames

JPEGS = [{"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 95}, {"restart_marker_rows": 1}]
DAMAGE = {
    "jpg": {"truncated": "truncated", "without its end": "truncated", "missing": "missing", "empty": "empty"}
    | {"text": "not an image", "a folder": "directory", "a bomb": "decompression bomb", "closed": "cut off"}
    | {"PostScript": "not an image"},
    "png": {"truncated": "truncated", "without its end": "truncated", "bad pixels": "", "closed": "truncated"},
    "webp": {"truncated": "truncated", "without its end": "truncated"},
    "tif": {"truncated": "truncated"},
}
ENDS = {"jpg": b"\xff\xd9", "png": bytes(4) + b"IEND\xaeB`\x82"}


@pytest.mark.parametrize("suffix", DAMAGE)
def test_broken_files_are_detected_and_spare_the_others(decoder, save, suffix):
    reasons = DAMAGE[suffix]
    files = [save(f"{i}.{suffix}") for i in range(2 * len(reasons) + 1)]
    crops, flips = whole_frames(len(files)), np.zeros(len(files), bool)
    intact = decoder.decode(files, crops, flips).frames
    for file, how in zip(files[1::2], reasons, strict=True):
        whole = file.read_bytes()
        file.unlink()
        size = whole.find(b"\xff\xc0") + 5
        broken = {
            "empty": b"",
            "truncated": whole[: len(whole) // 2],
            "without its end": whole[:-20],
            "closed": whole[: len(whole) // 2] + ENDS.get(suffix, b""),
            "text": b"not an image",
            "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow starts Ghostscript
            "a bomb": whole[:size] + struct.pack(">HH", 60_000, 60_000) + whole[size + 4 :],  # pixels, says the header
            "bad pixels": whole[:2000] + bytes(400) + whole[2400:],  # header and end are intact
        }
        if how == "a folder":
            file.mkdir()
        elif how != "missing":
            file.write_bytes(broken[how])
    frames, bad = decoder.decode(files, crops, flips)
    assert list(bad) == list(range(1, len(files), 2))
    for found, reason in zip(bad.values(), reasons.values(), strict=True):
        assert reason in found
    assert torch.equal(frames[::2], intact[::2])


def distance(a, b):
    """Mean difference in grey levels."""
    return (a.int() - b.int()).abs().float().mean().item()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_damaged_exif_costs_no_image(decoder, photograph, save):
    plain = {suffix: save(f"plain.{suffix}", quality=95, lossless=True) for suffix in ("jpg", "png", "webp", "avif")}
    jpg, png = plain["jpg"].read_bytes(), plain["png"].read_bytes()
    exif = Image.Exif()
    exif[0x010F] = "the maker of the camera"
    avif = save("exif.avif", exif=exif, quality=95).read_bytes()
    damaged = {
        "jpg": jpg[:2] + b"\xff\xe1\0\x10Exif\0\0garbage!" + jpg[2:],
        "png": png[:33] + chunk(b"eXIf", b"garbage!") + png[33:],
        "webp": save("a.webp", lossless=True, exif=b"Exif\0\0garbage!").read_bytes(),
        "avif": avif.replace(exif.tobytes()[6:14], b"garbage!"),
    }
    for suffix, content in damaged.items():
        file = plain[suffix].with_stem("damaged")
        file.write_bytes(content)
        assert content != plain[suffix].read_bytes()
        frames, bad = decoder.decode([plain[suffix], file], whole_frames(2), np.zeros(2, bool))
        assert not bad
        assert distance(*frames) < 1


def test_cut_jpegs_that_were_closed_are_bad_and_grey_images_are_not(decoder, photograph, save):
    """Missing pixels are grey; the whole image has grey of the same value at its end."""
    photograph.paste((128, 128, 128), (100, 100, 200, 150))
    for i, options in enumerate(JPEGS):
        for mode in ("RGB", "L"):
            file = save(f"{mode}{i}.jpg", photograph.convert(mode), **options)
            whole = file.read_bytes()
            assert not decoder.decode([file], whole_frames(1), np.zeros(1, bool)).bad
            assert not is_cut(file)
            for share in (0.3, 0.5) if "progressive" in options else (0.3, 0.5, 0.8):
                file.write_bytes(whole[: int(share * len(whole))] + b"\xff\xd9")
                bad = decoder.decode([file], whole_frames(1), np.zeros(1, bool)).bad
                assert "cut off" in bad[0], (options, mode, share)
    two = save("two.mpo", save_all=True, append_images=[photograph])
    assert not decoder.decode([two], whole_frames(1), np.zeros(1, bool)).bad
    two.write_bytes(two.read_bytes()[: two.stat().st_size // 4] + b"\xff\xd9")
    assert "cut off" in decoder.decode([two], whole_frames(1), np.zeros(1, bool)).bad[0]


def test_pixels_of_32_bits_are_refused_and_of_16_or_12_are_scaled(decoder, photograph, save):
    grey = np.asarray(photograph.convert("L"))
    with_nan = np.where(grey > 200, np.nan, grey / 255).astype(np.float32)
    deep = {"float": grey / np.float32(255), "nan": with_nan, "int": grey.astype(np.int32) * 65537}
    files = [save(f"{name}.tif", Image.fromarray(values)) for name, values in deep.items()]
    bad = decoder.decode(files, whole_frames(3), np.zeros(3, bool)).bad
    assert len(bad) == 3
    assert all("32 bits" in reason for reason in bad.values())
    big_endian = Image.frombytes("I;16B", photograph.size, (grey.astype(">u2") * 257).tobytes())
    packed = np.packbits(((grey[..., None].astype(int) * 16 >> np.arange(11, -1, -1)) & 1).astype(np.uint8)).tobytes()
    width, height = photograph.size
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 256, 277: 1, 278: height, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    twelve = save("twelve.tif")
    twelve.write_bytes((b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(256, b"\0") + packed)
    plain = save("grey.png", Image.fromarray(grey))
    files = [plain, twelve, save("b.tif", big_endian), save("b.png", big_endian)]
    frames, bad = decoder.decode(files, whole_frames(4), np.zeros(4, bool))
    assert not bad
    assert max(distance(frames[0], frame) for frame in frames) < 1


def test_suffixes_are_those_of_the_formats():
    """No other format is opened, whatever the file is called."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
    assert known - {".pfm"} == IMAGE_SUFFIXES
    assert not IMAGE_SUFFIXES & OTHER_IMAGE_SUFFIXES
    assert set(FORMATS) <= set(Image.OPEN)


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
