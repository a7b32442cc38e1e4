"""The DALI graph, one for the GPU and the CPU: region of interest, resize, flip. Needs DALI to be installed."""

from __future__ import annotations

from typing import Literal, NamedTuple

from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

GraphDevice = Literal["gpu", "cpu"]


class Nodes(NamedTuple):
    """What a pipeline may return.

    Args:
        regions: (h, w, 3) uint8 each, RGB, upright: what the crops keep.
        frames: (size, size, 3) uint8 each, resized and flipped.
    """

    regions: DataNode
    frames: DataNode


def frame_nodes(device: GraphDevice, size: int) -> Nodes:
    """Define the graph in the current pipeline.

    Inputs, a batch each: `encoded` (n,) uint8, the bytes of a file; `anchor` and `shape` (2,) int32, left and top,
    width and height of the region in the upright image; `mirror` () int32, for frames alone.
    """
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
    regions = fn.decoders.image_slice(
        encoded,
        anchor,
        shape,
        device="mixed" if device == "gpu" else "cpu",  # mixed: from bytes in host memory to pixels on the GPU
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # libjpeg's, so that nvJPEG's chroma is that of the CPU decoders
    )
    resized = fn.resize(regions, size=(size, size), interp_type=types.INTERP_CUBIC, antialias=True)
    return Nodes(regions, fn.flip(resized, horizontal=mirror))


def define_pipeline(
    device: GraphDevice,
    size: int,
    output: Literal["regions", "frames"],
    *,
    max_frames: int,
    threads: int,
    device_id: int | None,
) -> Pipeline:
    """A pipeline with the graph, not built yet; what its output does not need is left out by DALI.

    Args:
        device: where regions and frames are made.
        size: side of a frame in pixels.
        output: what a run returns.
        max_frames: most frames of a run.
        threads: of DALI, on the CPU.
        device_id: number of the GPU; None: no GPU.
    """
    # Batches are decoded ahead of time by the loader's threads, each with a pipeline of its own.
    pipeline = Pipeline(batch_size=max_frames, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(getattr(frame_nodes(device, size), output))
    return pipeline
