"""All kinds of image files and orientations, every decoder alike; the cache; the DALI graph on the CPU."""

import os
import re
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastmum.data import decode
from fastmum.data.decode import PillowDecoder, make_decoder
from fastmum.data.decode.image import (
    KEPT,
    crop_box,
    crop_boxes,
    draw_crops,
    jpeg_scale,
    read_size,
    read_upright,
    whole_frames,
)  # fmt: skip
from fastmum.data.errors import DataError

KINDS = {
    "jpg": ["RGB", "L", "CMYK"],
    "png": ["RGB", "L", "P", "RGBA", "LA", "I;16"],
    "webp": ["RGB", "L", "RGBA"],
    "tif": ["RGB", "L", "I;16"],
    "gif": ["P"],
    "avif": ["RGB"],
    "jp2": ["RGB", "I;16"],
    "pgm": ["L", "I;16"],
    "tga": ["RGB", "LA"],
}
JPEGS = [{"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}, {"restart_marker_rows": 1}]


SIZE = 64


def draw(count):
    """Crops and flips for a number of files."""
    rng = np.random.default_rng(0)
    return draw_crops(rng, count, (0.2, 1.0), (3 / 4, 4 / 3)), rng.random(count) < 0.5


def distance(a, b):
    """Mean difference in grey levels."""
    return (a.int() - b.int()).abs().float().mean().item()


def check(decoder, files, tolerance=0.5):
    """Decode files and compare every frame with the reference: read, turn, crop, resize, flip the whole file."""
    crops, flips = draw(len(files))
    frames, bad = decoder.decode(files, crops, flips)
    assert not bad
    assert (frames.shape, frames.dtype) == ((len(files), decoder.size, decoder.size, 3), torch.uint8)
    for file, frame, crop, flip in zip(files, frames, crops, flips, strict=True):
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
        image = image.convert("RGB").crop(crop_box(crop, *image.size))
        plain = image.resize((decoder.size, decoder.size), Image.Resampling.BICUBIC)
        plain = torch.from_numpy(np.array(ImageOps.mirror(plain) if flip else plain))
        assert distance(frame, plain) < tolerance, file.name
    return frames


@pytest.mark.parametrize("suffix", KINDS)
def test_kinds_of_images(decoder, photograph, save, suffix):
    deep = Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257)
    images = {mode: deep if mode == "I;16" else photograph.convert(mode) for mode in KINDS[suffix]}
    for mode in {"RGBA", "LA"} & set(images):
        images[mode].putalpha(Image.linear_gradient("L").resize(photograph.size))
    files = [save(f"{mode}.{suffix}", image, lossless=True) for mode, image in images.items()]
    files += [save(f"{i}.jpg", **options) for i, options in enumerate(JPEGS)] if suffix == "jpg" else []
    frames = check(decoder, files * 4)
    assert frames.float().std() > 20, "a picture, not a plain area"


def test_turned_and_small_photographs(decoder, photograph, save):
    suffixes = ("jpg", "png", "webp", "tif", "avif")
    files = [save(f"{o}.{suffix}", orientation=o) for suffix in suffixes for o in range(1, 9)]
    check(decoder, files * 2)
    for file in files[24:32]:  # TIFFs, which Pillow turns itself
        assert read_size(file) == (int(file.stem), *photograph.size[:: -1 if int(file.stem) > 4 else 1])
        assert read_upright(file).shape[1::-1] == read_size(file)[1:]
    check(PillowDecoder(SIZE, cache_bytes=10**8), files)
    xmp = [save(f"xmp{o}.jpg", xmp=b'<x tiff:Orientation="%d"/>' % o) for o in (3, 6)]  # which DALI does not read
    check(decoder, xmp * 2)
    sizes = [(1, 1), (1, 9), (9, 1), (3, 2), (63, 65)]
    files = [save(f"{i}.jpg", photograph.resize(size)) for i, size in enumerate(sizes)]
    check(decoder, files * 3, tolerance=1)


def test_files_that_dali_fails_on_are_decoded_by_pillow(save, dali):
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
def test_decoders_agree_on_photographs(request, save, dali, origin, size):
    """For frames of 48 pixels Pillow decodes most of these files scaled."""
    if origin == "shared":
        scenes = request.getfixturevalue("shared") / "data" / "scenes"
        files = [file for scene in SHARED_SCENES for file in sorted((scenes / scene).glob("*.jpg"))[:4]]
    else:
        images = [Image.fromarray(getattr(skimage.data, name)()) for name in SKIMAGE]
        files = [save(f"{i}.{s}", image, quality=92) for s in ("jpg", "png") for i, image in enumerate(images)]
        files.append(save("large.jpg", images[-1].resize((2600, 2600)), quality=92))
    frames = check(make_decoder("dali_cpu", size), files)
    pillow = make_decoder("pillow", size).decode(files, *draw(len(files)))
    assert not pillow.bad
    by_file = {f.name: distance(a, b) for f, a, b in zip(files, pillow.frames, frames, strict=True)}
    assert max(by_file.values()) <= 2, by_file


def test_decoding_stays_in_its_thread(decoder, photograph, save):
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


def test_images_that_fit_are_read_once_and_nothing_else_changes(save, photograph, monkeypatch):
    read, reads = decode.image.read_file, []
    monkeypatch.setattr(decode.image, "read_file", lambda file: reads.append(file.name) or read(file))
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


def test_dali_by_name(dali):
    assert isinstance(make_decoder("dali_cpu", 64), dali.DaliCpuDecoder)
    with pytest.raises(DataError, match="the run is on 'cpu'"):
        make_decoder("dali", 64)
    for name in ("dali", "auto"):
        decoder = make_decoder(name, 64, "cuda:1")
        assert isinstance(decoder, dali.DaliGpuDecoder)
        assert decoder.device == torch.device("cuda", 1)


@pytest.fixture
def files(save, photograph):
    suffixes = ["jpg", "png", "webp"] * 3
    return [save(f"{i}.{suffix}", photograph.rotate(30 * i)) for i, suffix in enumerate(suffixes)]


def test_the_whole_graph_makes_the_frames_of_the_decoder(files, photograph, dali):
    """The GPU resizes and flips in the graph, the CPU decoder after it."""
    crops, flips = draw(len(files))
    boxes = crop_boxes(crops, np.array([photograph.size] * len(files)))
    pipeline = dali.define_pipeline("cpu", SIZE, "frames", 1, None, 16)
    (output,) = pipeline.run(
        encoded=[np.frombuffer(file.read_bytes(), np.uint8) for file in files],
        anchor=boxes[:, :2].astype(np.int32),
        shape=(boxes[:, 2:] - boxes[:, :2]).astype(np.int32),
        mirror=flips.astype(np.int32),
    )
    in_graph = torch.from_dlpack(output.as_tensor())
    frames, bad = make_decoder("dali_cpu", SIZE).decode(files, crops, flips)
    assert not bad
    assert in_graph.shape == frames.shape == (9, SIZE, SIZE, 3)
    for ours, theirs in zip(frames, in_graph, strict=True):
        assert distance(ours, theirs) < 0.5


def description(node) -> list:
    """A node and its inputs, as if all were on the CPU, without positions in the source."""
    lines = [line for line in str(node.source.spec).splitlines() if "_origin" not in line]
    return [re.sub("gpu|mixed", "cpu", "\n".join(lines)), [description(n) for n in node.source.inputs]]


def test_the_graphs_of_gpu_and_cpu_differ_only_in_the_device(dali):
    nodes = {}
    for device in ("cpu", "gpu"):
        with dali.Pipeline(batch_size=4, num_threads=1, device_id=None):
            nodes[device] = dali.frame_nodes(device, SIZE)
        assert [node.device for node in nodes[device]] == [device, device]
    described = description(nodes["cpu"][1])
    assert described == description(nodes["gpu"][1])
    assert "antialias: True" in str(described)
    graph = dali.define_pipeline("gpu", SIZE, "frames", 4, None, 96).serialize()
    for word in (b"mixed", b"ImageSlice", b"Resize", b"Flip", b"encoded", b"anchor", b"shape", b"mirror"):
        assert word in graph


def test_runs_of_every_length_and_several_threads(save, dali):
    decoder, file = make_decoder("dali_cpu", SIZE), save("a.jpg")
    counts = [3 * dali.CPU_RUN, 1, dali.CPU_RUN - 1, dali.CPU_RUN, dali.CPU_RUN + 1]
    crops, flips = draw(max(counts))

    def decode(n):
        return decoder.decode([file] * n, crops[:n], flips[:n]).frames

    with ThreadPoolExecutor(3) as pool:
        longest, *others = pool.map(decode, counts * 2)
    for frames in others:
        assert torch.equal(frames, longest[: len(frames)])


@pytest.fixture
def runs(dali, monkeypatch):
    """The pipelines that decoders define from now on, and (pipeline, frames, bytes of regions) of every run."""
    define, made = dali.define_pipeline, []
    runs = []

    def watched(*args):
        pipeline = define(*args)
        made.append(pipeline)
        run = pipeline.run

        def watch(**inputs):
            runs.append((pipeline, len(inputs["encoded"]), 3 * int(inputs["shape"].prod(1).sum())))
            time.sleep(0.01)  # so that other threads want a pipeline, too
            return run(**inputs)

        pipeline.run = watch
        return pipeline

    monkeypatch.setattr(dali, "define_pipeline", watched)
    return made, runs


def test_all_threads_share_two_pipelines_on_a_gpu_and_regions_are_bounded(photograph, save, dali, runs, monkeypatch):
    """The graph of the GPU, on the CPU: bad files, one that Pillow must decode, and a region beyond the bound."""
    monkeypatch.setattr(dali, "RUN_BYTES", 100_000)
    made, done = runs
    kinds = [{}, {"image": photograph.resize((90, 60))}, {"image": photograph.resize((400, 300))}, {"orientation": 6}]
    files = [save(f"{i}.jpg", **kinds[i % 4]) for i in range(16)]
    files[3], files[9] = files[3].with_name("absent.jpg"), save("palette.gif", photograph.convert("P"))
    files[12].write_bytes(b"no image")
    decoder, (crops, flips) = dali.DaliGpuDecoder(SIZE, torch.device("cpu")), draw(16)
    plain = make_decoder("pillow", SIZE).decode(files, crops, flips)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: decoder.decode(files, crops, flips), range(12)))
    for frames, bad in results:
        assert bad.keys() == plain.bad.keys() == {3, 12}
        assert all(distance(frames[i], plain.frames[i]) < 2 for i in range(16) if i not in bad)
    assert len(made) == dali.GPU_PIPELINES == len({id(pipeline) for pipeline, _, _ in done})
    assert all(size <= dali.RUN_BYTES or frames == 1 for _, frames, size in done)
    assert max(frames for _, frames, _ in done) > 1
    assert any(size > dali.RUN_BYTES for _, _, size in done)
    assert made[0].max_batch_size == dali.GPU_RUN
    assert made[0].num_threads == dali.GPU_THREADS


def test_memory_of_a_run_is_used_again_only_after_its_frames_are_copied(files, dali, runs):
    """Another thread's run in the same pipeline must not change the frames of this one."""
    crops, flips = draw(len(files))
    decoder = dali.DaliGpuDecoder(SIZE, torch.device("cpu"))
    first = decoder.decode(files, crops, flips).frames
    kept = first.clone()
    again = decoder.decode(files[::-1], crops, flips).frames
    assert torch.equal(first, kept)
    assert not torch.equal(first, again)
    assert len(runs[0]) == 1


def test_dali_that_fails_on_everything_is_an_error(files, dali, monkeypatch):
    """Pillow does not silently replace it."""
    decoder, broken = dali.DaliCpuDecoder(SIZE), Mock()
    broken.run.side_effect = RuntimeError("out of memory")
    monkeypatch.setattr(decoder._runner, "_define", lambda: broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        decoder.decode(files, *draw(len(files)))
