"""The folder of a run, its lock, and the lines of its metrics.jsonl."""

import codecs
import contextlib
import fcntl
import itertools
import json
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmum.config.schema import ConfigError
from fastmum.files import ABANDONED, free_path, write_atomic

if TYPE_CHECKING:  # reports import this module, and no torch
    from fastmum.engine.distributed import DistContext

log = logging.getLogger(__name__)

VISIBLE_WITHIN = 10.0  # seconds until a new file must be seen on other machines, where NFS caches folders


class RunDir:
    """Paths of the files that a run writes into the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"  # resolved
        self.configs = root / "configs"  # step_N.yaml: the configuration from step N on
        self.metrics = root / "metrics.jsonl"  # one JSON object per log step
        self.metrics_cut = root / "metrics.cut.jsonl"  # what resumed runs cut off metrics.jsonl
        self.bad_frames = root / "bad_frames.log"  # a line per frame that cannot be decoded
        self.checkpoints = root / "checkpoints"
        self.tensorboard = root / "tensorboard"
        self.wandb_id = root / "wandb_id"  # id of the run in Weights & Biases
        self.profile = root / "profile"  # traces of `profile.steps`
        self.newest_picture = root / "reconstruction.png"
        self.lock = root / ".lock"  # locked while a run writes here; its text names that run's first process
        self._locked: int | None = None  # file descriptor

    @contextlib.contextmanager
    def held(self, world: "DistContext") -> Iterator[None]:
        """Create and lock the folder for this run, and check that all processes see it; all of them must call this.

        The kernel drops the lock when the process ends, however it ends. ConfigError on all ranks: another run holds
        the folder, or it cannot be written, or it is not the same folder for all processes.
        """
        try:
            text, refused = self._acquire() if world.is_main else "", ""
        except ConfigError as error:
            text, refused = "", str(error)
        text, refused = world.gather((text, refused))[0]
        try:
            if refused:
                raise ConfigError(refused)
            if blind := [name for name in world.gather("" if self._sees(text) else world.name) if name]:
                failed = f"run.dir is '{self.root}', but {blind[0]} sees another folder there than rank 0"
                raise ConfigError(f"{failed} ({len(blind)} in all): it must be on a file system that all share")
            yield
        finally:
            self._release()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError into a ConfigError that names `run.dir`."""
        try:
            yield
        except OSError as error:
            raise ConfigError(f"run.dir is '{self.root}', but cannot be written ({error.strerror})") from None

    def _acquire(self) -> str:
        """Lock the folder and return the text of its lock."""
        with self.writing():
            self.root.mkdir(parents=True, exist_ok=True)
            file = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only files open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # on NFS the server's, for all machines
        except (BlockingIOError, PermissionError):
            owner = os.read(file, 1000).decode(errors="replace").partition("\n")[0] or "a process that did not say who"
            os.close(file)
            raise ConfigError(
                f"run.dir is '{self.root}', which another run uses ({owner}): end it, or choose another run.dir; if "
                f"its machine is gone for good, delete '{self.lock}'"
            ) from None
        except OSError as error:
            log.warning("'%s' cannot be locked (%s): nothing keeps a second run out", self.lock, error.strerror)
        self._release()
        self._locked = file
        text = f"host {socket.gethostname()}, process {os.getpid()}\n{uuid.uuid4()}\n"
        with contextlib.suppress(OSError):  # a full disk
            os.ftruncate(file, 0)
            os.pwrite(file, text.encode(), 0)
            os.fsync(file)
        return os.pread(file, 1000, 0).decode(errors="replace")

    def _release(self) -> None:
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def _sees(self, text: str) -> bool:
        deadline = time.monotonic() + VISIBLE_WITHIN
        while True:
            with contextlib.suppress(OSError):
                if self.lock.read_text(errors="replace") == text:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)

    def picture(self, step: int, name: str = "reconstruction") -> Path:
        """A picture after `step` steps; the name of reconstructions is left out."""
        prefix = "step" if name == "reconstruction" else name
        return self.root / "pictures" / f"{prefix}_{step:07d}.png"

    def write_config(self, text: str, step: int) -> None:
        """Replace `config.yaml`; the configurations that held before `step` stay in `configs`, with their first steps.

        Those from later steps, which the run does again, are renamed like checkpoints.
        """
        new = text.encode(errors="backslashreplace")
        self.configs.mkdir(exist_ok=True)
        if self.config.exists() and not any(self.configs.iterdir()):  # of a version that kept none
            write_atomic(self.configs / "step_0000000.yaml", self.config.read_bytes())
        kept = {int(file.stem[5:]): file for file in self.configs.glob("step_*.yaml") if file.stem[5:].isdigit()}
        held = b""
        for first, file in sorted(kept.items()):
            content = file.read_bytes()
            if first < step or (first == step and content == new):
                held = content
            else:
                file.rename(free_path(file.with_name(file.name + ABANDONED)))
        if held != new:
            write_atomic(self.configs / f"step_{step:07d}.yaml", new)
        if not self.config.exists() or self.config.read_bytes() != new:
            write_atomic(self.config, new)

    def set_aside(self) -> None:
        """Rename the folder, if it holds a run, to the next free `<name>.old-<n>`; a held one is locked anew."""
        if not self.config.exists():
            return
        names = (self.root.with_name(f"{self.root.name}.old-{number}") for number in itertools.count(1))
        old = next(name for name in names if not name.exists())
        with self.writing():
            self.root.rename(old)
        log.info("the run in %s was renamed to %s", self.root, old)
        if self._locked is not None:
            self._acquire()


def metrics_line(step: int, values: Mapping[str, float | None]) -> bytes:
    """A line of strict JSON: non-finite values are null."""
    content = {"step": step, **{name: finite(value) for name, value in values.items()}}
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def finite(value: float | None) -> float | None:
    """The value as a Python number, None if it is not finite."""
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; none if the file is missing. Lines that are no record are skipped."""
    return [record for _, record in _records(path)]


def end_of_step(path: Path, step: int) -> int:
    """Offset in bytes after the lines of the first `step` steps."""
    return max((end for end, record in _records(path) if record["step"] <= step), default=0)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines with a step, each with the offset of its end."""
    end = 0
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:  # the last one was cut by a crash
        end += len(line) + 1
        with contextlib.suppress(ValueError, RecursionError):  # also of bytes that are not UTF-8
            record = json.loads(line.removeprefix(codecs.BOM_UTF8))
            if isinstance(record, dict) and type(record.get("step")) is int:
                yield end, record
