"""Decoding with DALI on a GPU or on the CPU.

A thread of the loader reads the files of a batch, looks at their headers, turns crops into pixels, and runs a pipeline
of its own on them. What DALI cannot decode, Pillow does, and its frame travels through the same pipeline as a PPM.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali.tensors import TensorListCPU, TensorListGPU

from fastmum.data.crops import crop_box
from fastmum.data.decode.decoder import Decoded
from fastmum.data.decode.geometry import UPRIGHT, place
from fastmum.data.decode.graph import Pipeline, define_pipeline
from fastmum.data.decode.header import FrameError, read_file, read_header
from fastmum.data.decode.pillow import PillowDecoder
from fastmum.data.decode.resize import resize

TensorList = TensorListCPU | TensorListGPU

log = logging.getLogger(__name__)

FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP"})  # DALI's that are tested here to equal Pillow's
CPU_RUN = 8  # most frames of a run on the CPU: bounds the memory for regions of large images
GPU_THREADS = 4  # of each pipeline, for the part of JPEG decoding that stays on the CPU


class Encoded(NamedTuple):
    """One frame on its way into a pipeline.

    Args:
        data: (n,) uint8, the bytes of a file.
        box: left, top, width, height of its region in the upright image.
    """

    data: np.ndarray
    box: tuple[int, int, int, int]


NOTHING = Encoded(np.frombuffer(b"P6 1 1 255\n\0\0\0", np.uint8), (0, 0, 1, 1))


class DaliCpuDecoder:
    """DALI decodes regions on the CPU, a thread each for those that call; torch resizes them.

    DALI's own resizing, at the end of the graph that the GPU runs in full, takes six times as long on a CPU.

    Args:
        size: side of a frame in pixels.
        pin_memory: return page-locked memory, from which copies to a GPU are asynchronous.
    """

    def __init__(self, size: int, pin_memory: bool = False) -> None:
        self.size = size
        self.pin_memory = pin_memory
        self._runner = _Runner(
            size, lambda n: define_pipeline("cpu", size, "regions", max_frames=n, threads=1, device_id=None)
        )

    def decode(self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray) -> Decoded:
        """See `Decoder.decode`."""
        frames = torch.empty(len(files), self.size, self.size, 3, dtype=torch.uint8, pin_memory=self.pin_memory)
        out, bad = frames.numpy(), {}
        for begin in range(0, len(files), CPU_RUN):
            part = slice(begin, begin + CPU_RUN)
            regions, failed = self._runner.run(files[part], crops[part], None, max_frames=CPU_RUN)
            bad |= {begin + i: reason for i, reason in failed.items()}
            for i, flip in enumerate(flips[part].tolist()):
                place(resize(regions.at(i), self.size), out[begin + i], UPRIGHT, flip)
        return Decoded(frames, bad)


class DaliGpuDecoder:
    """DALI decodes with nvJPEG, resizes and flips on a GPU; the frames stay where they are.

    Args:
        size: side of a frame in pixels.
        device: the GPU.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = torch.device("cuda", device.index or 0)
        self._runner = _Runner(
            size,
            lambda n: define_pipeline(
                "gpu", size, "frames", max_frames=n, threads=GPU_THREADS, device_id=self.device.index
            ),
        )

    def decode(self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray) -> Decoded:
        """See `Decoder.decode`."""
        with torch.cuda.device(self.device):
            # DALI returns once the frames are complete, so no stream has to wait for them.
            outputs, bad = self._runner.run(files, crops, flips, max_frames=len(files))
            return Decoded(torch.from_dlpack(outputs.as_tensor()), bad)


class _Runner:
    """Runs pipelines on files: as many as threads call at once; no batch is lost to a file that DALI cannot decode."""

    def __init__(self, size: int, define: Callable[[int], Pipeline]) -> None:
        self.size = size
        self._define = define
        self._pillow = PillowDecoder(size)
        self._for_pillow: set[Path] = set()  # files that DALI has failed on
        self._idle: list[Pipeline] = []
        self._room = 0  # most frames asked for: a replacement's run of one must not leave a pipeline that small
        self._lock = threading.Lock()

    def run(
        self, files: Sequence[Path], crops: np.ndarray, flips: np.ndarray | None, max_frames: int
    ) -> tuple[TensorList, dict[int, str]]:
        """One run of a pipeline.

        Args:
            files, crops: as in `Decoder.decode`.
            flips: likewise; None for pipelines that return regions.
            max_frames: that pipelines are to have room for.

        Returns:
            The pipeline's output; index and reason of every file that cannot be decoded.
        """
        frames, bad = self._encode_all(files, crops)
        try:
            return self._feed(frames, flips, max_frames), bad
        except Exception as error:  # DALI raises whatever its operators do, and seldom says for which frame
            log.debug("DALI lost a batch, which is decoded again: %s", error)
        for i, file in enumerate(files):
            if i not in bad and not self._succeeds(frames[i], flips, max_frames):
                self._for_pillow.add(file)
        frames, bad = self._encode_all(files, crops)
        return self._feed(frames, flips, max_frames), bad

    def _succeeds(self, frame: Encoded, flips: np.ndarray | None, max_frames: int) -> bool:
        try:
            self._feed([frame], flips if flips is None else flips[:1], max_frames)
        except Exception:  # as above
            return False
        return True

    def _feed(self, frames: Sequence[Encoded], flips: np.ndarray | None, max_frames: int) -> TensorList:
        boxes = np.array([frame.box for frame in frames], np.int32)
        inputs = {
            "encoded": [frame.data for frame in frames],
            "anchor": np.ascontiguousarray(boxes[:, :2]),
            "shape": np.ascontiguousarray(boxes[:, 2:]),
        }
        if flips is not None:
            inputs["mirror"] = flips.astype(np.int32)
        with self._pipeline(max_frames) as pipeline:
            (output,) = pipeline.run(**inputs)
        return output

    @contextmanager
    def _pipeline(self, max_frames: int) -> Iterator[Pipeline]:
        """A pipeline for the calling thread alone; one that fails is given up, its state being unknown."""
        with self._lock:
            self._room = max(self._room, max_frames)
            pipeline = self._idle.pop() if self._idle else None
        if pipeline is None or pipeline.max_batch_size < max_frames:
            pipeline = self._define(self._room)
        yield pipeline
        with self._lock:
            self._idle.append(pipeline)

    def _encode_all(self, files: Sequence[Path], crops: np.ndarray) -> tuple[list[Encoded], dict[int, str]]:
        frames, bad = [], {}
        for i, (file, crop) in enumerate(zip(files, crops, strict=True)):
            try:
                frames.append(self._encode(file, crop))
            except FrameError as error:
                frames.append(NOTHING)
                bad[i] = str(error)
        return frames, bad

    def _encode(self, file: Path, crop: np.ndarray) -> Encoded:
        """Read a file.

        Raises:
            FrameError: it cannot be decoded.
        """
        if file in self._for_pillow:
            return self._encode_with_pillow(file, crop)
        data = read_file(file)
        header = read_header(data)
        if header.image.format not in FORMATS:
            return self._encode_with_pillow(file, crop)
        left, top, right, bottom = crop_box(crop, header.width, header.height)
        return Encoded(np.frombuffer(data, np.uint8), (left, top, right - left, bottom - top))

    def _encode_with_pillow(self, file: Path, crop: np.ndarray) -> Encoded:
        frame = np.empty((self.size, self.size, 3), np.uint8)
        self._pillow.decode_to(frame, file, crop, flip=False)
        header = b"P6 %d %d 255\n" % (self.size, self.size)
        return Encoded(np.frombuffer(header + frame.tobytes(), np.uint8), (0, 0, self.size, self.size))
