"""The DALI graph on the CPU, and that the GPU has the same."""

import re
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch

dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from fastmum.data.decode import make_decoder  # noqa: E402
from fastmum.data.decode.dali import CPU_RUN, DaliCpuDecoder, _Runner, define_pipeline, frame_nodes  # noqa: E402
from fastmum.data.decode.image import crop_boxes  # noqa: E402

SIZE = 64


@pytest.fixture
def files(save, photograph):
    suffixes = ["jpg", "png", "webp"] * 3
    return [save(f"{i}.{suffix}", photograph.rotate(30 * i)) for i, suffix in enumerate(suffixes)]


def test_the_whole_graph_makes_the_frames_of_the_decoder(files, photograph, draw, distance):
    """The GPU resizes and flips in the graph, the CPU decoder after it."""
    crops, flips = draw(len(files))
    boxes = crop_boxes(crops, np.array([photograph.size] * len(files)))
    pipeline = define_pipeline("cpu", SIZE, "frames", 1, None, 16)
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


def test_the_graphs_of_gpu_and_cpu_differ_only_in_the_device():
    nodes = {}
    for device in ("cpu", "gpu"):
        with dali.Pipeline(batch_size=4, num_threads=1, device_id=None):
            nodes[device] = frame_nodes(device, SIZE)
        assert [node.device for node in nodes[device]] == [device, device]
    described = description(nodes["cpu"][1])
    assert described == description(nodes["gpu"][1])
    assert "antialias: True" in str(described)
    graph = define_pipeline("gpu", SIZE, "frames", 4, None, 96).serialize()
    for word in (b"mixed", b"ImageSlice", b"Resize", b"Flip", b"encoded", b"anchor", b"shape", b"mirror"):
        assert word in graph


def test_runs_of_every_length_and_several_threads(save, draw):
    decoder, file = make_decoder("dali_cpu", SIZE), save("a.jpg")
    counts = [3 * CPU_RUN, 1, CPU_RUN - 1, CPU_RUN, CPU_RUN + 1]
    crops, flips = draw(max(counts))

    def decode(n):
        return decoder.decode([file] * n, crops[:n], flips[:n]).frames

    with ThreadPoolExecutor(3) as pool:
        longest, *others = pool.map(decode, counts * 2)
    for frames in others:
        assert torch.equal(frames, longest[: len(frames)])


def test_pipelines_have_room_for_the_largest_run_so_far(files, draw):
    """Also those made for a replacement while another thread decodes a batch."""
    made = []

    class Fake:
        def __init__(self, frames):
            self.max_batch_size = frames
            made.append(frames)

        def run(self, encoded, **others):
            if len(encoded) > 1:
                runner.run(files[:1], crops[:1], None, 1)
            return ([None] * len(encoded),)

    crops, _ = draw(len(files))
    runner = _Runner(SIZE, Fake)
    for _ in range(2):
        assert len(runner.run(files, crops, None, 96)[0]) == len(files)
    assert made == [96, 96]


def test_dali_that_fails_on_everything_is_an_error(files, draw, monkeypatch):
    """Pillow does not silently replace it."""
    decoder, broken = DaliCpuDecoder(SIZE), Mock(max_batch_size=CPU_RUN)
    broken.run.side_effect = RuntimeError("out of memory")
    monkeypatch.setattr(decoder._runner, "_define", lambda frames: broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        decoder.decode(files, *draw(len(files)))
