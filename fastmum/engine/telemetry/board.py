"""TensorBoard's event files, written without its thread: that one dies of a full disk, and says so in a traceback."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar

from fastmum.engine.metrics import finite
from fastmum.engine.rundir import RunDir
from fastmum.engine.telemetry.appender import Appender


class Board:
    """One event file, of this process.

    Args:
        run: the folder.
        step: steps done by the checkpoint that the run goes on from; what older files hold after it is not shown.
    """

    def __init__(self, run: RunDir, step: int) -> None:
        # The names sort by time, and TensorBoard reads the files of a folder in their order.
        newest = max((path.name for path in run.tensorboard.glob("events.out.tfevents.*")), default="")
        began = max(int(time.time()), _seconds(newest) + 1)
        self._file = Appender(
            run.tensorboard / f"events.out.tfevents.{began:010d}.{socket.gethostname()}.{os.getpid()}"
        )
        self._append(Event(step=step + 1, wall_time=time.time(), file_version="brain.Event:2"))
        self._append(Event(step=step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """A point of every curve that has one."""
        numbers = {name: number for name, value in values.items() if (number := finite(value)) is not None}
        points = [point for name, number in numbers.items() for point in scalar(name, number).value]
        self._append(Event(step=step, wall_time=time.time(), summary=Summary(value=points)))

    def picture(self, step: int, picture: Image.Image) -> None:
        """A reconstruction; it does not wait for room on the disk."""
        summary = image("reconstruction", np.asarray(picture), dataformats="HWC")
        self._append(Event(step=step, wall_time=time.time(), summary=summary), keep=False)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, event: Event, keep: bool = True) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue(), keep)


def _seconds(name: str) -> int:
    """When an event file began, from its name; 0 for no file."""
    part = name.removeprefix("events.out.tfevents.").partition(".")[0]
    return int(part) if part.isdigit() else 0
