"""Decoding with DALI, on a GPU or on the CPU.

Each loader thread reads the files of a batch, checks their headers, converts crops to pixels and runs a pipeline on a
few frames at a time, so that memory does not grow with the batch or the images. Files that DALI cannot decode are
decoded by Pillow and enter the same pipeline as PPM images.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
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
CPU_RUN = 8  # frames per run on the CPU
GPU_RUN = 96  # frames per run on a GPU: the paper's batch, if the regions are small
RUN_BYTES = 256 << 20  # of the regions of a run, three bytes a pixel; a larger region runs alone
GPU_PIPELINES = 2  # of a process, for all loader threads: one works on the CPU while another one uses the GPU
GPU_THREADS = 8  # of each pipeline on a GPU, for the part of JPEG decoding that stays on the CPU


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
    # No prefetching here: the loader's threads do it.
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
        define = partial(define_pipeline, "cpu", size, "regions", 1, None, CPU_RUN)
        self._runner = _Runner(size, define, CPU_RUN)

    def decode(self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray) -> Decoded:
        """See `Decoder.decode`."""
        frames = torch.empty(len(files), self.size, self.size, 3, dtype=torch.uint8, pin_memory=self.pin_memory)
        out = frames.numpy()

        def take(indices: list[int], regions: Any) -> None:
            for number, i in enumerate(indices):
                place(resize(regions.at(number), self.size), out[i], UPRIGHT, bool(flips[i]))

        bad = self._runner.run(files, crops, None, take)
        return Decoded(frames, _with_cut(bad, out[CORNERS], files))


class DaliGpuDecoder:
    """DALI decodes with nvJPEG, resizes and flips on a GPU; the frames stay there.

    All callers share `GPU_PIPELINES` pipelines: each has memory that is never given back. With the device "cpu" the
    same graph runs there, as tests do.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, cuda = size, device.type == "cuda"
        self.device = torch.device("cuda", device.index or 0) if cuda else device
        where: GraphDevice = "gpu" if cuda else "cpu"
        define = partial(define_pipeline, where, size, "frames", GPU_THREADS, self.device.index, GPU_RUN)
        self._runner = _Runner(size, define, GPU_RUN, GPU_PIPELINES)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """For copies: on the default stream they, and the pipeline they are from, would wait for training."""
        return torch.cuda.Stream(self.device)

    def decode(self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray) -> Decoded:
        """See `Decoder.decode`."""
        with torch.cuda.stream(self._stream) if self.device.type == "cuda" else nullcontext():
            frames = torch.empty(len(files), self.size, self.size, 3, dtype=torch.uint8, device=self.device)

            def take(indices: list[int], outputs: Any) -> None:
                # DALI returns once its frames are complete, and reuses their memory in the next run.
                frames[torch.tensor(indices, device=self.device)] = torch.from_dlpack(outputs.as_tensor())
                if frames.is_cuda:
                    self._stream.synchronize()

            bad = self._runner.run(files, crops, flips, take)
            return Decoded(frames, _with_cut(bad, frames[CORNERS].cpu().numpy(), files))


def _with_cut(bad: dict[int, str], corners: np.ndarray, files: Sequence[Path]) -> dict[int, str]:
    """`bad` and the JPEGs that were cut before the end of the crop and closed; `corners` (F, 4, 3) of the frames."""
    grey = (corners == 128).all(2).any(1)
    cut = (i for i in np.flatnonzero(grey).tolist() if i not in bad and image.is_cut(files[i]))
    return dict(sorted((bad | dict.fromkeys(cut, image.CUT_OFF)).items()))


# Input of a pipeline for one frame: (n,) uint8 bytes of a file; left, top, width, height of the region.
_Encoded = tuple[np.ndarray, tuple[int, int, int, int]]
# Gets the indices of some files, and their regions or frames, which are valid until it returns.
_Take = Callable[[list[int], Any], None]


class _Runner:
    """Runs pipelines on files; a file that DALI cannot decode loses no batch.

    Args:
        size: of the frames in pixels.
        define: makes a pipeline.
        frames: most frames of a run.
        pipelines: that run at the same time, others wait; None: one per concurrent caller.
    """

    def __init__(
        self, size: int, define: Callable[[], Pipeline], frames: int, pipelines: int | None = None
    ) -> None:  # fmt: skip
        self._define, self._frames = define, frames
        self.size = size
        self._pillow = PillowDecoder(size)
        self._for_pillow: set[Path] = set()  # files on which DALI failed
        self._idle: list[Pipeline] = []
        self._turn: AbstractContextManager = threading.BoundedSemaphore(pipelines) if pipelines else nullcontext()

    def run(self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray | None, take: _Take) -> dict[int, str]:
        """Run pipelines on all files, in runs of up to `frames` frames and `RUN_BYTES` of regions, and `take` theirs.

        `flips` is None for pipelines that return regions. Returns index and reason of every file that cannot be
        decoded; nothing is taken for these.
        """
        bad: dict[int, str] = {}
        some: dict[int, _Encoded] = {}
        room = RUN_BYTES
        for i, (file, crop) in enumerate(zip(files, crops, strict=True)):
            try:
                encoded = self._encode(file, crop)
            except FrameError as error:
                bad[i] = str(error)
                continue
            _, (_, _, width, height) = encoded
            room -= 3 * width * height
            if some and (room < 0 or len(some) == self._frames):
                bad |= self._run(some, files, crops, flips, take)
                some, room = {}, RUN_BYTES - 3 * width * height
            some[i] = encoded
        return bad | self._run(some, files, crops, flips, take)

    def _run(
        self, some: dict[int, _Encoded], files: Sequence[Path], crops: np.ndarray, flips: np.ndarray | None,
        take: _Take,
    ) -> dict[int, str]:  # fmt: skip
        """One run, or if DALI fails one for each file; index and reason of those that cannot be decoded."""
        try:
            self._feed(some, flips, take)
            return {}
        except Exception as error:  # DALI raises any type, and rarely names the frame
            log.debug("DALI failed on a run, whose files are decoded one by one: %s", error)
        bad = {}
        for i, encoded in some.items():
            try:
                self._feed({i: encoded}, flips, take)
            except Exception:  # as above
                self._for_pillow.add(files[i])
                try:
                    self._feed({i: self._encode(files[i], crops[i])}, flips, take)
                except FrameError as error:
                    bad[i] = str(error)
        return bad

    def _feed(self, some: dict[int, _Encoded], flips: np.ndarray | None, take: _Take) -> None:
        if not some:
            return
        indices, boxes = list(some), np.array([box for _, box in some.values()], np.int32)
        inputs: dict[str, Any] = {"encoded": [data for data, _ in some.values()]}
        inputs |= {"anchor": np.ascontiguousarray(boxes[:, :2]), "shape": np.ascontiguousarray(boxes[:, 2:])}
        if flips is not None:
            inputs["mirror"] = flips[indices].astype(np.int32)
        with self._turn:
            try:
                pipeline = self._idle.pop()
            except IndexError:
                pipeline = self._define()
            (output,) = pipeline.run(**inputs)  # a pipeline that raises is not used again, since its state is unknown
            take(indices, output)
            del output  # before another thread runs the pipeline
            self._idle.append(pipeline)

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
