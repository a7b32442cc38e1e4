"""Build manifests: `python -m fastmum.data.build NAME --root RAW --out FILE`."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.contrib.logging import logging_redirect_tqdm

from fastmum.data.archives import Tree, TreePath, open_root, trees, with_places
from fastmum.data.builders import BUILDERS
from fastmum.data.builders.base import RULES, Builder, Options
from fastmum.data.errors import DataError
from fastmum.data.manifest import Counts, Manifest, SequenceRecord, write_manifest
from fastmum.data.processes import until_terminated
from fastmum.data.spread import add_arguments, cluster, spread
from fastmum.data.store import is_url
from fastmum.errors import program
from fastmum.files import expand_user
from fastmum.progress import progress_bar

log = logging.getLogger(__name__)


class NoSequenceError(DataError):
    """A data set has parts, but they contain no sequence."""


class Built(NamedTuple):
    """Result of a build."""

    counts: Counts
    parts: int
    empty: int  # parts without a sequence


def build(
    name: str, root: str | Path, out: str | Path, *, rule: str = "paper", seed: int = 0, workers: int = 1,
    ray: str | None = None, dataset: str | None = None, progress: bool = False, **options: Any,
) -> Built:  # fmt: skip
    """Write the manifest of a data set; equal arguments give equal bytes, for any number of workers and machines.

    NoSequenceError: the parts contain no sequence, for instance because of `min_frames`. DataError: missing files,
    another layout, or a package that is not installed.

    Args:
        name: a key of `BUILDERS`; `options` are that builder's.
        root, out: folder of the data set, and the manifest, written atomically.
        rule: "paper", or "released" for the rule of the authors' script; `seed` is of the rules that draw.
        workers: reading processes; 0 or 1 reads in this one.
        ray: address of a Ray cluster to read on instead, see `fastmum.data.spread.cluster`.
        dataset: name of the data set in the manifest, None for the builder's.
    """
    builder, out = BUILDERS[name], _file(out)
    root = _folder(root, builder.archives)
    if unknown := options.keys() - builder.options.keys():
        raise TypeError(f"{name} has no option {sorted(unknown)}")
    values = {key: option.default for key, option in builder.options.items()} | options
    settings = Options(rule=rule, seed=seed, out=out, **values)
    if builder.begin:
        builder.begin(root, settings)
    parts = builder.parts(root, settings)
    if not parts:
        raise DataError(f"there is nothing of {name} under '{root}'; expected: {builder.layout}")
    empty = 0

    def records() -> Generator[SequenceRecord]:
        nonlocal empty
        bar = progress_bar(total=len(parts), unit="part", desc=name, show=progress)
        with bar, logging_redirect_tqdm() if progress else contextlib.nullcontext():
            for found in _in_order(name, root, parts, settings, workers, ray):
                some = False
                for record in found:
                    some = True
                    yield record
                empty += not some
                bar.update()
        if empty == len(parts):
            least = values.get("min_frames") or 1
            what = f"nothing under '{root}' makes a sequence of {name} of at least {least} frames (--min-frames)"
            raise NoSequenceError(f"{what}; expected: {builder.layout}")

    frame_root = Path(str(builder.root(root, settings) if builder.root else root))
    if frame_root.is_relative_to(out.parent):  # then both can be moved together
        frame_root = frame_root.relative_to(out.parent)
    metadata = {"builder": name, "rule": rule, "seed": seed, "options": values, "source": str(root)}
    with contextlib.closing(records()) as found:  # an error ends the bar and the workers at once
        counts = write_manifest(out, found, dataset=dataset or name, root=frame_root, metadata=metadata)
    for what, known in Manifest(out).known.items():
        if 0 < known < counts.frames:
            log.warning("%d of %d frames have no %s", counts.frames - known, counts.frames, what)
    return Built(counts, len(parts), empty)


def _in_order(
    name: str, root: Path, parts: Sequence[str], options: Options, workers: int, ray: str | None
) -> Iterator[Iterable[SequenceRecord]]:
    """Sequences of every part, in the order of the parts; those that are read in this process one by one."""
    if ray is None and (workers <= 1 or len(parts) == 1):
        yield from (_read(name, root, options, part) for part in parts)
        return
    found = root.tree if isinstance(root, TreePath) else None
    work, begin = partial(_read_all, name, root, options), partial(_know, found)
    yield from spread(work, parts, workers=workers, ray=ray, begin=begin, paths=(root, options.out.parent))


def _read_all(name: str, root: Path, options: Options, part: str) -> list[SequenceRecord]:
    return list(_read(name, root, options, part))


def _read(name: str, root: Path, options: Options, part: str) -> Iterator[SequenceRecord]:
    """The sequences of a part, with the places of their files in archives."""
    builder = BUILDERS[name]
    try:
        base = builder.root(root, options) if builder.root else root
        for record in builder.sequences(root, part, options):
            tree = root.tree if isinstance(root, TreePath) else None
            yield with_places(record, tree, Path(str(base))) if tree else record
    except OSError as error:
        named = f" '{error.filename}'" if error.filename else ""
        raise DataError(f"'{part}' cannot be read:{named} {error.strerror or error}") from None


def _know(found: Tree | None) -> None:
    """Tell a process what is known of archives."""
    if found is not None:
        trees[str(found.root)] = found


def _folder(root: str | Path, archives: bool) -> Path:
    root = Path(os.path.abspath(expand_user(root)))
    found = open_root(root) if archives else root if root.is_dir() else None
    if found is None:
        raise DataError(f"--root is '{root}', but there is no such folder{' or archive' * archives}")
    return found


def _file(out: str | Path) -> Path:
    if is_url(out):
        raise DataError(
            f"--out is '{out}', but a manifest is built into a file; upload it then, or `data pack` it there"
        )
    out = Path(os.path.abspath(expand_user(out)))
    if out.is_dir():
        raise DataError(f"--out is '{out}', but that is a folder; give the name of a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out is '{out}', but its folder cannot be created ({error.strerror})") from None
    if not os.access(out.parent, os.W_OK):
        raise DataError(f"--out is '{out}', but its folder cannot be written")
    return out


def _parser() -> argparse.ArgumentParser:
    description = "Build the manifest of a data set: which frames make up which sequences."
    epilog = "`python -m fastmum.data.build NAME --help` shows the rules and options of a data set."
    parser = argparse.ArgumentParser(prog=program("fastmum.data.build"), description=description, epilog=epilog)
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True, title="data sets and their layouts")
    for name, builder in BUILDERS.items():
        released = f"\n--rule released: {builder.released}" if builder.released else ""
        description = _escaped(f"layout: {builder.layout}\n--rule paper: {builder.paper}{released}")
        plain = argparse.RawDescriptionHelpFormatter
        command = names.add_parser(name, help=_escaped(builder.layout), description=description, formatter_class=plain)
        command.add_argument("--root", required=True, metavar="RAW", help="folder of the data set")
        command.add_argument("--out", required=True, metavar="FILE", help="the manifest, such as data/NAME.arrow")
        command.add_argument("--rule", choices=RULES, default="paper", help="default %(default)s")
        command.add_argument("--seed", type=int, default=0, metavar="S", help="of rules that draw (default 0)")
        add_arguments(command)
        command.add_argument("--dataset", metavar="D", help=f"name of the data set in the manifest (default {name})")
        for key, option in builder.options.items():
            value: dict[str, Any] = {"type": option.type or type(option.default), "choices": option.choices or None}
            shown = "" if option.default is None else f" (default {option.default})"
            if isinstance(option.default, bool):
                value, shown = {"action": argparse.BooleanOptionalAction}, ""  # which shows the default
            help = _escaped(option.help + shown)
            command.add_argument(_flag(key), dest=key, default=option.default, help=help, **value)
    return parser


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _check(values: dict[str, Any], builder: Builder) -> None:
    bounds = {"seed": (0, None), "workers": (0, None)} | {key: (o.min, o.max) for key, o in builder.options.items()}
    for key, (least, most) in bounds.items():
        if (value := values[key]) is not None:
            if least is not None and value < least:
                raise DataError(f"{_flag(key)} is {value}, but must be at least {least}")
            if most is not None and value > most:
                raise DataError(f"{_flag(key)} is {value}, but must be at most {most}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    values = vars(_parser().parse_args(argv))
    name = values.pop("name")

    def command() -> None:
        _check(values, BUILDERS[name])
        with cluster(values["ray"], values["workers"]):
            built = build(name, progress=True, **values)
        sequences, frames = built.counts
        empty = f"; {built.empty} gave none" if built.empty else ""
        print(f"{values['out']}: {sequences} sequences, {frames} frames of {built.parts} parts{empty}")

    return until_terminated(command, "nothing was written")


if __name__ == "__main__":
    import fastmum.data.build  # tasks are pickled by the name of their module

    sys.exit(fastmum.data.build.main())
