"""Times of alternatives on a GPU, measured once and kept in `$FASTMUM_CACHE/measured`."""

import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Sequence

import torch

from fastmum.files import cache_folder, read_json, write_atomic

log = logging.getLogger(__name__)
RUNS, WARM_UP = 5, 2  # of a measurement


def measured_times(
    kind: str, what: str, names: Sequence[str], measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Milliseconds of each of `names`, from the cache, else by `measure`, which may give fewer names.

    Args:
        kind: what the times are of; start of the file's name.
        what: everything that they depend on: device, versions, shapes.
        names: of the alternatives.
        measure: called if the cache has no complete times; complete ones are kept.
    """
    digest = hashlib.sha256(what.encode()).hexdigest()[:16]
    file = cache_folder() / "measured" / f"{kind}-{digest}.json"
    try:
        known = read_json(file)["ms"]
        if known.keys() == set(names) and all(isinstance(ms, float) and ms > 0 for ms in known.values()):
            return known
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # absent or damaged
    times = measure()
    if times.keys() == set(names):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps({"what": what, "ms": times}))
        except OSError as error:
            log.warning("measured times of %s are not kept: %s", kind, error)
    return times


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a few runs on the current CUDA device."""
    times = []
    for _ in range(WARM_UP + RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP:])
