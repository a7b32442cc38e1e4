"""Sinks of a run's metrics and pictures: metrics.jsonl, TensorBoard, image files, Weights & Biases.

A full disk never stops training: metrics wait in memory until there is room again, pictures are dropped.
"""

import contextlib
import io
import logging
import os
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar

from fastmum.config.schema import ConfigError
from fastmum.engine.rundir import RunDir, end_of_step, finite, metrics_line
from fastmum.files import write_atomic

log = logging.getLogger(__name__)

# Seconds that Weights & Biases may block a run at its start and at its end, where a preempted run has little time left.
# Unsent data stay in the run's folder for `wandb sync`.
WANDB_TIMEOUT = 20


class Telemetry:
    """Writes metrics and pictures; a resumed run first moves what was written after the step it resumes from elsewhere.

    Args:
        step: steps done by the checkpoint that the run resumes from, 0 for a new run.
        project, name, config: of the run in Weights & Biases; ConfigError if its package is not installed.
    """

    def __init__(
        self, run: RunDir, step: int, project: str | None = None, name: str = "", config: dict[str, Any] | None = None
    ) -> None:
        self._run, self._picture_warned = run, False
        wandb = [WandbSink(project, run, name, config)] if project else []  # first: it may raise
        end = end_of_step(run.metrics, step)
        rest = run.metrics.read_bytes()[end:] if run.metrics.is_file() else b""
        self._cut = RecordFile(run.metrics_cut, run.metrics_cut.stat().st_size if run.metrics_cut.is_file() else 0)
        if rest:
            self._cut.append(rest if rest.endswith(b"\n") else rest + b"\n")
        self._lines = RecordFile(run.metrics, end)
        self._sinks: list[TensorBoard | WandbSink] = [TensorBoard(run, step), *wandb]

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log one line of metrics by name after `step` steps; None and non-finite values are null, without a point."""
        self._lines.append(metrics_line(step, values))
        points = {name: number for name, value in values.items() if (number := finite(value)) is not None}
        for sink in self._sinks:
            sink.log(step, points)

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Write pictures by name: one file per step, and the newest as `<name>.png` in the run's folder."""
        for name, picture in pictures.items():
            content = io.BytesIO()
            picture.save(content, "PNG")
            for path in (self._run.picture(step, name), self._run.root / f"{name}.png"):
                self._write(path, content.getvalue())
            for sink in self._sinks:
                sink.picture(step, name, picture)

    def close(self) -> None:
        """Flush and close all sinks."""
        for sink in (self._cut, self._lines, *self._sinks):
            sink.close()

    def _write(self, path: Path, content: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
            self._picture_warned = False
        except OSError as error:
            if not self._picture_warned:
                log.warning("%s cannot be written (%s); training continues", path, error.strerror)
            self._picture_warned = True


def log_line(step: int, steps: int, values: Mapping[str, float | None], unit: str, devices: int) -> str:
    """The main metrics of a log step of a run as text, with the time left at the mean pace, h:mm:ss."""
    names = {"loss": "loss", "held_out_loss": "held-out", "lr": "lr", f"{unit}_per_s": f"{unit}/s"}
    found = [f"{label} {value:.4g}" for name, label in names.items() if (value := values.get(name)) is not None]
    if (projected := values["gpu_hours_projected"]) is not None:
        hours = (projected - (values["gpu_hours"] or 0)) / devices
        found.append(f"left {timedelta(seconds=round(hours * 3600))}")
    return f"step {step}/{steps}: {', '.join(found)}"


class TensorBoard:
    """One event file per process; TensorBoard hides the points of older files after `step`, from which a run resumes.

    `SummaryWriter` is not used: its thread dies of a full disk, and it raises OSError ever after, even with room again.
    """

    def __init__(self, run: RunDir, step: int) -> None:
        # TensorBoard reads the files of a folder in the order of their names, which start with a time.
        newest = max((path.name for path in run.tensorboard.glob("events.out.tfevents.*")), default="")
        seconds = newest.removeprefix("events.out.tfevents.").partition(".")[0]
        began = max(int(time.time()), int(seconds) + 1 if seconds.isdigit() else 0)
        name = f"events.out.tfevents.{began:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordFile(run.tensorboard / name)
        self._append(step + 1, file_version="brain.Event:2")
        self._append(step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        points = [point for name, value in values.items() for point in scalar(name, value).value]
        self._append(step, summary=Summary(value=points))

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._append(step, keep=False, summary=image(name, np.asarray(picture), dataformats="HWC"))

    def close(self) -> None:
        self._file.close()

    def _append(self, step: int, keep: bool = True, **content: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(step=step, wall_time=time.time(), **content).SerializeToString())
        self._file.append(record.getvalue(), keep)


class RecordFile:
    """An append-only file of whole records; records that cannot be written wait in memory.

    A partial write is truncated; an existing file at once to `end` bytes. Warns once per outage.
    """

    def __init__(self, path: Path, end: int = 0) -> None:
        self._path, self._end = path, end
        self._file: int | None = None
        self._waiting: deque[bytes] = deque()
        self._failed_bytes = 0  # of the last failed write; 0: no outage
        if path.exists():
            self._flush()

    def append(self, record: bytes, keep: bool = True) -> None:
        """Append a record after those that wait; without `keep`, drop it if it cannot be written now."""
        self._waiting.append(record)
        self._flush()
        if self._waiting and not keep:
            self._waiting.pop()

    def close(self) -> None:
        """Try once more to write what waits, and close the file."""
        if self._waiting or self._file is not None:
            self._flush()
        if self._waiting:
            log.warning("%s: %d records could not be written and are lost", self._path, len(self._waiting))
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None

    def _flush(self) -> None:
        records, size = len(self._waiting), sum(map(len, self._waiting))
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._truncate(self._file)
            while self._waiting:
                record, written = self._waiting[0], 0
                while written < len(record):  # a disk that fills up accepts a part
                    written += os.pwrite(self._file, record[written:], self._end + written)
                self._end += written
                self._waiting.popleft()
        except OSError as error:
            if not self._failed_bytes:
                log.warning("%s cannot be written (%s); training continues", self._path, error.strerror)
            self._failed_bytes = max(1, sum(map(len, self._waiting)))
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._truncate(self._file)
        else:
            # A small record that fits where a large one did not does not end the outage.
            if 0 < self._failed_bytes <= size:
                log.info("%s can be written again; wrote %d records that waited", self._path, records)
                self._failed_bytes = 0

    def _truncate(self, file: int) -> None:
        """Drop what follows the last whole record: a part of one, or what a resumed run does not keep."""
        size = os.fstat(file).st_size
        if size > self._end:
            os.ftruncate(file, self._end)
        self._end = min(self._end, size)  # leaves no hole in a file that was truncated by others


class WandbSink:
    """A run of Weights & Biases, which a resumed run continues; its id is kept in the run's folder.

    Nothing is sent after the first failure, which is a warning. ConfigError: the package `wandb` is not installed.
    """

    def __init__(self, project: str, run: RunDir, name: str, config: dict[str, Any] | None) -> None:
        try:
            import wandb  # an extra
        except ImportError:
            key = f"telemetry.wandb is '{project}'"
            raise ConfigError(f"{key}, but wandb is not installed: pip install 'fastmum[wandb]'") from None
        self._wandb = wandb
        self._run: Any = None

        def init() -> None:
            if not run.wandb_id.exists():
                run.root.mkdir(parents=True, exist_ok=True)
                run.wandb_id.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
            self._run = wandb.init(
                project=project, name=name, id=run.wandb_id.read_text(encoding="utf-8").strip(), resume="allow",
                dir=str(run.root), config=config or {},
                settings=wandb.Settings(init_timeout=WANDB_TIMEOUT, finish_timeout=WANDB_TIMEOUT),
            )  # fmt: skip

        self._attempt(init)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to every curve; the service keeps the old ones of the steps that a resumed run repeats."""
        self._send(step, lambda: dict(values))

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._send(step, lambda: {name: self._wandb.Image(picture)})

    def close(self) -> None:
        """Wait until everything is sent, at most `WANDB_TIMEOUT`."""
        if self._run is not None:
            self._attempt(self._run.finish)

    def _send(self, step: int, content: Callable[[], dict[str, Any]]) -> None:
        run = self._run
        if run is not None and step >= run.starting_step:
            self._attempt(lambda: run.log(content(), step=step))

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # training continues whatever the service or its client raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("Weights & Biases is not used from here on: %s", reason)
            self._run = None
