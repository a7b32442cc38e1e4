"""What is in the files: every kind of image, every orientation, every way of being broken; all decoders alike."""

import os
import struct
import threading
import zlib

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from fastmum.data.crops import whole_frames
from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import ORIENTATION

KINDS = {
    "jpg": ["RGB", "L", "CMYK"],
    "png": ["RGB", "L", "P", "RGBA", "LA", "1", "I;16"],
    "webp": ["RGB", "L", "RGBA"],
    "tif": ["RGB", "L", "I;16"],
    "gif": ["P"],
}


def in_mode(photograph, mode):
    if mode == "I;16":
        return Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257)
    image = photograph.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in KINDS.items() for mode in modes])
def test_kinds_of_images(tmp_path, decoder, photograph, plainly, distance, draw, suffix, mode):
    file = tmp_path / f"a.{suffix}"
    in_mode(photograph, mode).save(file, **({"lossless": True} if suffix == "webp" else {}))
    crops, flips = draw(6)
    frames, bad = decoder.decode([file] * 6, crops, flips)
    assert not bad
    assert (frames.shape, frames.dtype) == ((6, 64, 64, 3), torch.uint8)
    # Dithered black and white overshoots everywhere, and where it is clipped depends on the order of the two passes.
    tolerance = 5 if mode == "1" else 0.5
    for frame, crop, flip in zip(frames, crops, flips, strict=True):
        assert distance(frame, plainly(file, crop, flip)) < tolerance
    assert frames.float().std() > 20, "a picture, not a plain area"


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}])
def test_kinds_of_jpegs(tmp_path, decoder, photograph, plainly, distance, draw, options):
    photograph.save(tmp_path / "a.jpg", **options)
    crops, flips = draw(4)
    frames, bad = decoder.decode([tmp_path / "a.jpg"] * 4, crops, flips)
    assert not bad
    for frame, crop, flip in zip(frames, crops, flips, strict=True):
        assert distance(frame, plainly(tmp_path / "a.jpg", crop, flip)) < 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_photographs_are_turned_upright(tmp_path, decoder, photograph, plainly, distance, draw, suffix, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    photograph.save(tmp_path / f"a.{suffix}", exif=exif)
    crops, flips = draw(5, seed=orientation)
    frames, bad = decoder.decode([tmp_path / f"a.{suffix}"] * 5, crops, flips)
    assert not bad
    for frame, crop, flip in zip(frames, crops, flips, strict=True):
        assert distance(frame, plainly(tmp_path / f"a.{suffix}", crop, flip)) < 0.5


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 2), (63, 65)])
def test_images_smaller_than_a_frame(tmp_path, decoder, photograph, plainly, distance, draw, size):
    photograph.resize(size).save(tmp_path / "a.jpg")
    crops, flips = draw(4)
    frames, bad = decoder.decode([tmp_path / "a.jpg"] * 4, crops, flips)
    assert not bad
    for frame, crop, flip in zip(frames, crops, flips, strict=True):
        assert distance(frame, plainly(tmp_path / "a.jpg", crop, flip)) < 1


def break_file(file, how):
    whole = file.read_bytes()
    match how:
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "truncated":
            file.write_bytes(whole[: len(whole) // 2])
        case "without its end":
            file.write_bytes(whole[:-20])
        case "text":
            file.write_text("not an image")
        case "a folder":
            file.unlink()
            file.mkdir()
        case "a bomb":  # 60,000 x 60,000 pixels, says the header
            size = whole.index(b"\xff\xc0") + 5
            file.write_bytes(whole[:size] + struct.pack(">HH", 60_000, 60_000) + whole[size + 4 :])


@pytest.mark.parametrize(
    ("suffix", "how", "reason"),
    [(s, "truncated", "truncated") for s in ("jpg", "png", "webp")]
    + [(s, "without its end", "truncated") for s in ("jpg", "png", "webp")]
    + [("jpg", "missing", "missing"), ("jpg", "empty", "empty"), ("jpg", "text", "not an image")]
    + [("jpg", "a folder", "directory"), ("jpg", "a bomb", "decompression bomb")],
)
def test_broken_files_are_found_and_spare_the_others(tmp_path, decoder, photograph, suffix, how, reason):
    files = [tmp_path / f"{i}.{suffix}" for i in range(5)]
    for file in files:
        photograph.save(file)
    crops, flips = whole_frames(5), np.zeros(5, bool)
    intact = decoder.decode(files, crops, flips).frames
    break_file(files[2], how)
    frames, bad = decoder.decode(files, crops, flips)
    assert list(bad) == [2]
    assert reason in bad[2]
    others = [0, 1, 3, 4]
    assert torch.equal(frames[others], intact[others])


def test_a_png_whose_pixels_are_broken_is_found(tmp_path, decoder, photograph):
    """The headers and the end are as they should be."""
    photograph.save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[2000:2400] = bytes(400)
    (tmp_path / "a.png").write_bytes(content)
    assert list(decoder.decode([tmp_path / "a.png"], whole_frames(1), np.zeros(1, bool)).bad) == [0]


@pytest.mark.parametrize("seed", range(5))
def test_jpegs_with_flipped_bytes_never_raise(tmp_path, decoder, photograph, seed):
    photograph.save(tmp_path / "a.jpg")
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    rng = np.random.default_rng(seed)
    content[2:-2] = [b ^ int(rng.integers(256)) if rng.random() < 0.005 else b for b in content[2:-2]]
    (tmp_path / "a.jpg").write_bytes(content)
    frames, bad = decoder.decode([tmp_path / "a.jpg"], whole_frames(1), np.zeros(1, bool))
    assert len(frames) == 1
    assert set(bad) <= {0}


def test_data_behind_the_end_of_a_jpeg_are_cameras_own(tmp_path, decoder, photograph):
    photograph.save(tmp_path / "a.jpg")
    crops, flips = whole_frames(1), np.zeros(1, bool)
    before = decoder.decode([tmp_path / "a.jpg"], crops, flips).frames
    with open(tmp_path / "a.jpg", "ab") as file:
        file.write(b"trailer" * 500)
    after, bad = decoder.decode([tmp_path / "a.jpg"], crops, flips)
    assert not bad
    assert torch.equal(before, after)


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_photograph(tmp_path, decoder, photograph):
    photograph.resize((32, 24)).save(tmp_path / "small.jpg")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x927C] = (tmp_path / "small.jpg").read_bytes()  # the maker's note may hold anything
    photograph.save(tmp_path / "a.jpg", exif=exif)
    whole = (tmp_path / "a.jpg").read_bytes()
    assert whole.count(b"\xff\xd9") == 2
    crops, flips = whole_frames(1), np.zeros(1, bool)
    assert not decoder.decode([tmp_path / "a.jpg"], crops, flips).bad
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    assert decoder.decode([tmp_path / "a.jpg"], crops, flips).bad == {0: "truncated"}


def rewrite_chunk(png, kind, change):
    """A PNG file with one chunk's checksum changed."""
    begin = png.index(kind)
    (length,) = struct.unpack(">I", png[begin - 4 : begin])
    end = begin + 4 + length
    return png[:end] + change(zlib.crc32(png[begin:end])) + png[end + 4 :]


def test_what_dali_fails_on_and_pillow_reads_is_decoded(tmp_path, photograph, draw, plainly, distance):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    decoder = make_decoder("dali_cpu", 64)
    files = [tmp_path / f"{i}.png" for i in range(40)]
    for file in files:
        photograph.save(file)
    crc = rewrite_chunk(files[7].read_bytes(), b"IDAT", lambda crc: struct.pack(">I", crc ^ 1))
    files[7].write_bytes(crc)
    crops, flips = draw(40)
    for _ in range(2):  # once by recovering, once by knowing
        frames, bad = decoder.decode(files, crops, flips)
        assert not bad
        for file, frame, crop, flip in zip(files, frames, crops, flips, strict=True):
            assert distance(frame, plainly(file, crop, flip)) < 0.5


SHARED_SCENES = ["street_lund", "fox", "british_museum", "drone_brighton", "hololens_office", "sacre_coeur"]


def photographs_of_skimage(folder):
    folder.mkdir()
    names = ["astronaut", "coffee", "chelsea", "rocket", "camera", "brick", "grass", "gravel", "moon"]
    for name in names:
        image = Image.fromarray(getattr(skimage.data, name)())
        image.save(folder / f"{name}.jpg", quality=92)
        image.save(folder / f"{name}.png")
    image.resize((2600, 2600)).save(folder / "large.jpg", quality=92)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("origin", ["skimage", "shared"])
@pytest.mark.parametrize("size", [48, 96, 256])
def test_decoders_agree_on_photographs(request, tmp_path, draw, distance, plainly, origin, size):
    """Frames of 48 pixels make Pillow decode most of these files scaled."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    if origin == "shared":
        scenes = request.getfixturevalue("shared") / "data" / "scenes"
        files = [file for scene in SHARED_SCENES for file in sorted((scenes / scene).glob("*.jpg"))[:4]]
    else:
        files = photographs_of_skimage(tmp_path / "photographs")
    crops, flips = draw(len(files))
    pillow, dali = (make_decoder(name, size).decode(files, crops, flips) for name in ("pillow", "dali_cpu"))
    assert not pillow.bad
    assert not dali.bad
    by_file = {f.name: distance(a, b) for f, a, b in zip(files, pillow.frames, dali.frames, strict=True)}
    assert max(by_file.values()) <= 2, by_file
    plain = {
        f.name: distance(frame, plainly(f, crop, flip, size))
        for f, frame, crop, flip in zip(files, dali.frames, crops, flips, strict=True)
    }
    assert max(plain.values()) < 0.5, plain


def test_decoding_stays_in_its_thread(tmp_path, decoder_name, photograph, draw):
    """Pools of threads that torch or DALI start for each thread of the loader would spin beside the training."""
    files = [tmp_path / "a.jpg", tmp_path / "b.png"] * 4
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photograph.resize((1200, 900)).save(files[0], exif=exif)
    photograph.save(files[1])
    decoder = make_decoder(decoder_name, 256, cache_bytes=10**7)
    crops, flips = draw(8)
    decoder.decode(files, crops, flips)  # DALI's one thread a pipeline starts here
    counts = []

    def work():
        counts.append(len(os.listdir("/proc/self/task")))
        for _ in range(3):
            decoder.decode(files, crops, flips)
        counts.append(len(os.listdir("/proc/self/task")))

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    assert counts[0] == counts[1]
