"""Decoding with DALI, on a GPU or on the CPU.

Each loader thread reads the files of a batch, checks their headers, converts crops to pixels and runs a pipeline that
no other thread uses. Files that DALI cannot decode are decoded by Pillow and enter the same pipeline as PPM images.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

from fastmum.data.decode import Decoded, PillowDecoder, image
from fastmum.data.decode.image import UPRIGHT, FrameError, crop_box, place, read_file, read_header, resize

GraphDevice = Literal["gpu", "cpu"]
GraphOutput = Literal["regions", "frames"]

log = logging.getLogger(__name__)

FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP"})  # decoded by DALI; tested to equal Pillow
CORNERS = slice(None), [0, 0, -1, -1], [0, -1, 0, -1]  # of frames (F, size, size, 3)
CPU_RUN = 8  # frames per run on the CPU; bounds the memory for regions of large images
GPU_THREADS = 4  # of each pipeline, for the part of JPEG decoding that stays on the CPU


def frame_nodes(device: GraphDevice, size: int) -> tuple[DataNode, DataNode]:
    """Define the graph in the current pipeline: region of interest, resize, flip.

    Inputs, one batch each: `encoded` (n,) uint8, the bytes of a file; `anchor` and `shape` (2,) int32, left and top,
    width and height of the region in the upright image; `mirror` () int32, only used by the frames. Returns regions
    (h, w, 3) and resized, flipped frames (size, size, 3), both uint8 RGB, upright.
    """
    encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
    anchor, shape = (fn.external_source(name=n, dtype=types.DALIDataType.INT32, ndim=1) for n in ("anchor", "shape"))
    mirror = fn.external_source(name="mirror", dtype=types.DALIDataType.INT32, ndim=0)
    where = "mixed" if device == "gpu" else "cpu"  # mixed: from bytes in host memory to pixels on the GPU
    # Fancy upsampling, as libjpeg, so that nvJPEG's chroma equals the CPU decoders'.
    regions = fn.decoders.image_slice(
        encoded, anchor, shape, device=where, output_type=types.DALIImageType.RGB, jpeg_fancy_upsampling=True
    )
    resized: Any = fn.resize(regions, size=(size, size), interp_type=types.DALIInterpType.INTERP_CUBIC, antialias=True)
    return regions, fn.flip(resized, horizontal=mirror)


def define_pipeline(
    device: GraphDevice, size: int, output: GraphOutput, threads: int, device_id: int | None, frames: int
) -> Pipeline:
    """A pipeline that returns `output` of the graph, for runs of up to `frames` frames; DALI prunes the rest.

    It has `threads` CPU threads, and the GPU `device_id` (None: no GPU).
    """
    # No prefetching here: the loader's threads do it, each with its own pipeline.
    pipeline = Pipeline(batch_size=frames, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(frame_nodes(device, size)[output == "frames"])
    return pipeline


class DaliCpuDecoder:
    """DALI decodes regions on the CPU, with one thread per caller; torch resizes them.

    The graph's own resize, which the GPU uses, takes six times as long on a CPU. With `pin_memory` frames are in
    page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(self, size: int, pin_memory: bool = False) -> None:
        self.size, self.pin_memory = size, pin_memory
        self._runner = _Runner(size, partial(define_pipeline, "cpu", size, "regions", 1, None))

    def decode(self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray) -> Decoded:
        """See `Decoder.decode`."""
        frames = torch.empty(len(files), self.size, self.size, 3, dtype=torch.uint8, pin_memory=self.pin_memory)
        out, bad = frames.numpy(), dict[int, str]()
        for begin in range(0, len(files), CPU_RUN):
            chunk = slice(begin, begin + CPU_RUN)
            regions, failed = self._runner.run(files[chunk], crops[chunk], None, CPU_RUN)
            bad |= {begin + i: reason for i, reason in failed.items()}
            for i, flip in enumerate(flips[chunk].tolist()):
                place(resize(regions.at(i), self.size), out[begin + i], UPRIGHT, flip)
        return Decoded(frames, _with_cut(bad, out[CORNERS], files))


class DaliGpuDecoder:
    """DALI decodes with nvJPEG, resizes and flips on a GPU; the frames stay there."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = torch.device("cuda", device.index or 0)
        self._runner = _Runner(size, partial(define_pipeline, "gpu", size, "frames", GPU_THREADS, self.device.index))

    def decode(self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray) -> Decoded:
        """See `Decoder.decode`."""
        with torch.cuda.device(self.device):
            # DALI returns once the frames are complete, so no stream has to wait for them.
            outputs, bad = self._runner.run(files, crops, flips, len(files))
            frames = torch.from_dlpack(outputs.as_tensor())
            return Decoded(frames, _with_cut(bad, frames[CORNERS].cpu().numpy(), files))


def _with_cut(bad: dict[int, str], corners: np.ndarray, files: Sequence[Path]) -> dict[int, str]:
    """`bad` and the JPEGs that were cut before the end of the crop and closed; `corners` (F, 4, 3) of the frames."""
    grey = (corners == 128).all(2).any(1)
    cut = (i for i in np.flatnonzero(grey).tolist() if i not in bad and image.is_cut(files[i]))
    return dict(sorted((bad | dict.fromkeys(cut, image.CUT_OFF)).items()))


# Input of a pipeline for one frame: (n,) uint8 bytes of a file; left, top, width, height of the region.
_Encoded = tuple[np.ndarray, tuple[int, int, int, int]]
_NOTHING: _Encoded = np.frombuffer(b"P6 1 1 255\n\0\0\0", np.uint8), (0, 0, 1, 1)


class _Runner:
    """Runs pipelines on files, one pipeline per concurrent caller; a file that DALI cannot decode loses no batch."""

    def __init__(self, size: int, define: Callable[..., Pipeline]) -> None:
        self.size = size
        self._define = define
        self._pillow = PillowDecoder(size)
        self._for_pillow: set[Path] = set()  # files on which DALI failed
        self._idle: list[Pipeline] = []
        self._room = 0  # largest run so far: the run of one replacement must not leave a pipeline that small
        self._lock = threading.Lock()

    def run(
        self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray | None, capacity: int
    ) -> tuple[Any, dict[int, str]]:
        """Run a pipeline for up to `capacity` frames; `flips` is None for pipelines that return regions.

        Returns a DALI TensorList, and index and reason of every file that cannot be decoded.
        """
        frames, bad = self._encode_all(files, crops)
        try:
            return self._feed(frames, flips, capacity), bad
        except Exception as error:  # DALI raises any type, and rarely names the frame
            log.debug("DALI failed on a batch, which is decoded again: %s", error)
        for i, file in enumerate(files):
            if i in bad:
                continue
            try:
                self._feed([frames[i]], flips if flips is None else flips[:1], capacity)
            except Exception:  # as above
                self._for_pillow.add(file)
        frames, bad = self._encode_all(files, crops)
        return self._feed(frames, flips, capacity), bad

    def _feed(self, frames: Sequence[_Encoded], flips: np.ndarray | None, capacity: int) -> Any:
        boxes = np.array([box for _, box in frames], np.int32)
        inputs: dict[str, Any] = {"encoded": [data for data, _ in frames]}
        inputs |= {"anchor": np.ascontiguousarray(boxes[:, :2]), "shape": np.ascontiguousarray(boxes[:, 2:])}
        if flips is not None:
            inputs["mirror"] = flips.astype(np.int32)
        with self._lock:
            self._room = max(self._room, capacity)
            pipeline = self._idle.pop() if self._idle else None
        if pipeline is None or pipeline.max_batch_size < capacity:
            pipeline = self._define(frames=self._room)
        (output,) = pipeline.run(**inputs)  # a pipeline that raises is not used again, since its state is unknown
        with self._lock:
            self._idle.append(pipeline)
        return output

    def _encode_all(self, files: Sequence[Path], crops: np.ndarray) -> tuple[list[_Encoded], dict[int, str]]:
        frames, bad = [], {}
        for i, (file, crop) in enumerate(zip(files, crops, strict=True)):
            try:
                frames.append(self._encode(file, crop))
            except FrameError as error:
                frames.append(_NOTHING)
                bad[i] = str(error)
        return frames, bad

    def _encode(self, file: Path, crop: np.ndarray) -> _Encoded:
        """Read a file, and decode it with Pillow if DALI cannot; raises FrameError if neither can."""
        if file not in self._for_pillow:
            data = read_file(file)
            header = read_header(data)
            if header.image.format in FORMATS and header.plain:
                left, top, right, bottom = crop_box(crop, header.width, header.height)
                return np.frombuffer(data, np.uint8), (left, top, right - left, bottom - top)
        frame = np.empty((self.size, self.size, 3), np.uint8)
        self._pillow.decode_to(frame, file, crop, flip=False)
        ppm = b"P6 %d %d 255\n" % (self.size, self.size) + frame.tobytes()
        return np.frombuffer(ppm, np.uint8), (0, 0, self.size, self.size)
