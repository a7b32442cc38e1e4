"""Work of commands, spread over processes of this machine or over a Ray cluster.

Tasks are independent, picklable, and give the same wherever they run. Results come in the order of the tasks, so files
do not depend on the number of workers or machines. Ray runs the tasks of lost workers and nodes again.
"""

import argparse
import contextlib
import importlib
import os
import re
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastmum.data.errors import DataError
from fastmum.data.processes import PREFETCH, map_in_order
from fastmum.data.remote import is_url
from fastmum.errors import FastmumError
from fastmum.files import source_version

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 8  # of a task whose worker or node was lost
ANSWER_S = 10.0  # until a cluster must accept a connection; Ray itself waits for minutes
HELP = "spread over a Ray cluster: auto (the running one), HOST:PORT, or local (started here for this command)"


def add_ray_argument(parser: argparse.ArgumentParser) -> None:
    """The option `--ray` of a command."""
    parser.add_argument("--ray", metavar="ADDRESS", help=HELP)


def add_arguments(
    parser: argparse.ArgumentParser, workers: int = min(os.cpu_count() or 1, 8), what: str = "processes"
) -> None:
    """The options `--workers` and `--ray` of a command."""
    help = f"{what} on this machine (default %(default)s)"
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help=help)
    add_ray_argument(parser)


def spread(
    work: Callable[[T], R], tasks: Sequence[T], *, workers: int = 1, threads: int = 0, ray: str | None = None,
    begin: Callable[[], None] | None = None, paths: Iterable[str | Path] = (), gpus: bool = False,
) -> Iterator[R]:  # fmt: skip
    """Results of `work` for each task, in order; an error of a task is raised in its place.

    DataError: a process was killed (here) or lost `RETRIES` times (Ray), the cluster cannot be used (see `cluster`), or
    a node has another version of fastmum or does not see one of the paths.

    Args:
        workers: processes of this machine; 0 or 1: this one. A cluster uses all its CPUs.
        threads: this many threads instead, for work that waits for storage.
        ray: address of a Ray cluster, as for `cluster`; None: this machine.
        begin: called first in each process.
        paths: files and folders that every node must see; URLs are left out.
        gpus: a task gets a GPU of the cluster, if it has any.
    """
    if ray is not None:
        yield from _on_cluster(work, tasks, ray, workers, begin, paths, gpus)
    elif threads:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(work, tasks)
    else:
        yield from map_in_order(work, tasks, workers, begin)


@contextlib.contextmanager
def cluster(address: str | None, workers: int | None = None) -> Iterator[Any]:
    """Connect to a Ray cluster and yield the package `ray`; uses a connection of this process if there is one.

    DataError: Ray is not installed, the address does not answer, or versions of Ray or Python differ.

    Args:
        address: "auto", "HOST:PORT" or "local", which starts one of `workers` CPUs (None: all) on
            this machine. None connects to none.
    """
    if address is None:
        yield None
        return
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise DataError("--ray needs Ray: pip install 'fastmum[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
    remedy = "start it by `ray start`, or see docs/storage.md"
    started = {"num_cpus": max(1, workers) if workers else None, "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        _connect(address if address != "auto" else os.environ.get("RAY_ADDRESS", "auto"))
        ray.init(address, logging_level="ERROR", **(started if address == "local" else {}))
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise DataError(f"--ray '{address}' cannot be used ({' '.join(str(error).split())}); {remedy}") from None
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray has its own
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    """Raise OSError or ValueError unless something answers there."""
    if address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        if not (host and port.isdecimal()):
            raise ValueError("it is not auto, local or HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()


class _Job(NamedTuple):
    """What processes of nodes need before they work."""

    version: str
    folder: str
    paths: tuple[str, ...]
    environment: Mapping[str, str]
    begin: Callable[[], None] | None


_prepared: dict[str, Callable[[Any], Any]] = {}  # of this process: the work of its job


def _on_cluster(
    work: Callable[[T], R], tasks: Sequence[T], address: str, workers: int, begin: Callable[[], None] | None,
    paths: Iterable[str | Path], gpus: bool,
) -> Iterator[R]:  # fmt: skip
    roots = {key: value for key, value in os.environ.items() if key.startswith("FASTMUM_ROOT_")}
    seen = tuple(_existing(Path(os.path.abspath(path))) for path in paths if not is_url(path))
    with cluster(address, workers) as ray:
        gpus = gpus and "GPU" in ray.cluster_resources()
        task = ray.remote(max_retries=RETRIES, num_gpus=int(gpus), scheduling_strategy="SPREAD")(_run)
        # Both are fetched once by each process; the work, which may hold a model, after the job was compared.
        job = ray.put(_Job(source_version(), os.getcwd(), seen, roots, begin)), ray.put(work)
        pending: deque = deque()
        ahead = 1
        try:
            for each in tasks:
                pending.append(task.remote(job, each))
                if len(pending) >= ahead:  # nodes come and go
                    ahead = PREFETCH * max(1, int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1)))
                if len(pending) >= ahead:
                    yield _result(ray, pending.popleft())
            while pending:
                yield _result(ray, pending.popleft())
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)


def _existing(path: Path) -> str:
    """The path, or for one in an archive the archive."""
    return str(next(each for each in (path, *path.parents) if each.exists()))


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FastmumError):
            raise error.cause from None
        if "failed to import" in str(error.cause):
            address = re.search(r"ip=([^,)]+)", str(error))
            name = address[1] if address else ""
            raise DataError(f"node {name} has no fastmum, or cannot import it; install the same as here") from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"a task was lost {RETRIES + 1} times, perhaps for lack of memory ({reason})") from None


def _run(job: tuple[Any, Any], task: Any) -> Any:
    """A task in a process of a node."""
    ray: Any = importlib.import_module("ray")
    key = job[0].hex()
    if key not in _prepared:
        _prepare(ray.get(job[0]))
        _prepared.clear()
        _prepared[key] = ray.get(job[1])
    return _prepared[key](task)


def _prepare(job: _Job) -> None:
    if (version := source_version()) != job.version:
        raise DataError(f"node {_node()} has fastmum {version}, but this is {job.version}; install the same")
    for path in job.paths:
        if not os.path.exists(path):
            remedy = "give paths that all nodes share, or URLs of a store"
            raise DataError(f"node {_node()} does not see '{path}'; {remedy}")
    with contextlib.suppress(OSError):  # relative paths that it names are then missing files
        os.chdir(job.folder)
    os.environ.update(job.environment)
    if job.begin is not None:
        job.begin()


def _node() -> str:
    ray: Any = sys.modules["ray"]
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
