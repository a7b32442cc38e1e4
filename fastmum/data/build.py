"""Build manifests: `python -m fastmum.data.build NAME --root RAW --out FILE`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fastmum.data.builders import BUILDERS
from fastmum.data.builders.base import RULES, Builder, Options
from fastmum.data.errors import DataError
from fastmum.data.manifest import Counts, SequenceRecord, write_manifest

log = logging.getLogger(__name__)

AHEAD = 4  # parts a worker that may wait for their turn: bounds the memory, keeps every worker busy


class NoSequenceError(DataError):
    """A data set whose parts are there, but make no sequence."""


class Built(NamedTuple):
    """What came of a build.

    Args:
        counts: of the manifest.
        parts: of the data set.
        empty: parts that gave no sequence.
    """

    counts: Counts
    parts: int
    empty: int


def build(
    name: str,
    root: str | Path,
    out: str | Path,
    *,
    rule: str = "paper",
    seed: int = 0,
    workers: int = 1,
    dataset: str | None = None,
    progress: bool = False,
    **options: Any,
) -> Built:
    """Write the manifest of a data set; equal arguments give equal bytes, whatever the number of workers.

    Args:
        name: a key of `BUILDERS`.
        root: where the data set lies.
        out: the manifest; written whole or not at all.
        rule: "paper", or "released" for what the authors' script does.
        seed: of the rules that draw.
        workers: processes that read; 0 or 1 reads in this one.
        dataset: name of the data set in the manifest, the builder's if None.
        progress: whether to show a bar.
        options: the builder's own, those not given as its defaults.

    Raises:
        NoSequenceError: there are parts, but they make no sequence, such as for `min_frames`.
        DataError: folders or files that are missing or not as the layout says, packages that are not installed.
    """
    builder, root, out = BUILDERS[name], _folder(root), _file(out)
    if unknown := options.keys() - builder.options.keys():
        raise TypeError(f"{name} has no option {sorted(unknown)}")
    values = {key: option.default for key, option in builder.options.items()} | options
    asked = Options(rule=rule, seed=seed, out=out, **values)
    if builder.begin:
        builder.begin(root, asked)
    parts = builder.parts(root, asked)
    if not parts:
        raise DataError(f"there is nothing of {name} under '{root}'; expected: {builder.layout}")
    frame_root = builder.root(root, asked) if builder.root else root
    metadata = {"builder": name, "rule": rule, "seed": seed, "options": values, "source": str(root)}
    empty = 0

    def records() -> Iterator[SequenceRecord]:
        nonlocal empty
        bar = tqdm(total=len(parts), unit="part", desc=name, disable=not progress, dynamic_ncols=True)
        with bar, logging_redirect_tqdm() if progress else contextlib.nullcontext():
            for found in _in_order(name, root, parts, asked, workers):
                empty += not found
                yield from found
                bar.update()
        if empty == len(parts):
            least = values.get("min_frames") or 1
            short = f" of at least {least} frames (--min-frames)" if least > 1 else ""
            raise NoSequenceError(
                f"nothing under '{root}' makes a sequence of {name}{short}; expected: {builder.layout}"
            )

    seen_root = _seen_from(out.parent, frame_root)
    with contextlib.closing(records()) as found:  # an error ends the bar and the workers at once
        counts = write_manifest(out, found, dataset=dataset or name, root=seen_root, metadata=metadata)
    return Built(counts, len(parts), empty)


def _in_order(
    name: str, root: Path, parts: Sequence[str], options: Options, workers: int
) -> Iterator[list[SequenceRecord]]:
    """Sequences of every part, in the order of the parts."""
    if workers <= 1 or len(parts) == 1:
        for part in parts:
            yield _read(BUILDERS[name], root, part, options)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(parts)), multiprocessing.get_context("spawn"), _begin_worker, (name, root, options)
    )
    try:
        waiting: deque = deque()
        for part in parts:
            waiting.append(pool.submit(_work, part))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("a process that reads was killed, perhaps for lack of memory; try fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read(builder: Builder, root: Path, part: str, options: Options) -> list[SequenceRecord]:
    try:
        return list(builder.sequences(root, part, options))
    except OSError as error:
        named = f" '{error.filename}'" if error.filename else ""
        raise DataError(f"'{part}' cannot be read:{named} {error.strerror or error}") from None


_work_of: tuple[Builder, Path, Options]  # of a worker process


def _begin_worker(name: str, root: Path, options: Options) -> None:
    global _work_of
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _work_of = BUILDERS[name], root, options


def _leave_with_parent() -> None:
    # A parent that is killed ends nobody, and a worker would wait for its next part for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(part: str) -> list[SequenceRecord]:
    builder, root, options = _work_of
    return _read(builder, root, part, options)


def _folder(root: str | Path) -> Path:
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"--root is '{root}', but there is no such folder")
    return Path(os.path.abspath(root))


def _file(out: str | Path) -> Path:
    out = Path(os.path.abspath(Path(out).expanduser()))
    if out.is_dir():
        raise DataError(f"--out is '{out}', but that is a folder; give the name of a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out is '{out}', but its folder cannot be made ({error.strerror})") from None
    if not os.access(out.parent, os.W_OK):
        raise DataError(f"--out is '{out}', but its folder cannot be written")
    return out


def _seen_from(folder: Path, root: Path) -> Path:
    """The root as a manifest in `folder` states it: relative if it lies in there, so that both can be moved."""
    return root.relative_to(folder) if root.is_relative_to(folder) else root


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastmum.data.build",
        description="Build the manifest of a data set: which frames make up which sequences.",
        epilog="`python -m fastmum.data.build NAME --help` shows the rules and options of a data set.",
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True, title="data sets and their layouts")
    for name, builder in BUILDERS.items():
        released = f"\n--rule released: {builder.released}" if builder.released else ""
        each = names.add_parser(
            name,
            help=_escaped(builder.layout),
            description=_escaped(f"layout: {builder.layout}\n--rule paper: {builder.paper}{released}"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        each.add_argument("--root", required=True, metavar="RAW", help="folder of the data set")
        each.add_argument("--out", required=True, metavar="FILE", help="the manifest, such as data/NAME.arrow")
        each.add_argument("--rule", choices=RULES, default="paper", help="default %(default)s")
        each.add_argument("--seed", type=int, default=0, metavar="S", help="of rules that draw (default %(default)s)")
        each.add_argument(
            "--workers", type=int, default=min(os.cpu_count() or 1, 8), metavar="N",
            help="processes that read (default %(default)s)",
        )  # fmt: skip
        each.add_argument("--dataset", metavar="D", help=f"name of the data set in the manifest (default {name})")
        for key, option in builder.options.items():
            _add_option(each, key, option)
    return parser


def _add_option(parser: argparse.ArgumentParser, key: str, option: Any) -> None:
    flag, default = f"--{key.replace('_', '-')}", option.default
    if isinstance(default, bool):
        parser.add_argument(flag, dest=key, action=argparse.BooleanOptionalAction, default=default, help=option.meaning)
        return
    shown = "" if default is None else f" (default {default})"
    parser.add_argument(
        flag, dest=key, type=option.kind or type(default), default=default, choices=option.choices or None,
        help=_escaped(option.meaning + shown),
    )  # fmt: skip


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _check(values: dict[str, Any], builder: Builder) -> None:
    least = {"seed": 0, "workers": 0} | {key: o.least for key, o in builder.options.items() if o.least is not None}
    for key, bound in least.items():
        if values[key] is not None and values[key] < bound:
            raise DataError(f"--{key.replace('_', '-')} is {values[key]}, but must be at least {bound}")
    for key, option in builder.options.items():
        if option.most is not None and values[key] is not None and values[key] > option.most:
            raise DataError(f"--{key.replace('_', '-')} is {values[key]}, but must be at most {option.most}")


def _terminated(number: int, _: object) -> NoReturn:
    print("terminated; nothing was written", file=sys.stderr)
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = _parser()
    values = vars(parser.parse_args(argv))
    name = values.pop("name")
    # What a batch system sends must clean up like Ctrl-C does.
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        _check(values, BUILDERS[name])
        built = build(name, progress=True, **values)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    sequences, frames = built.counts
    empty = f"; {built.empty} gave none" if built.empty else ""
    print(f"{values['out']}: {sequences} sequences, {frames} frames of {built.parts} parts{empty}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
