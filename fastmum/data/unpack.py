"""Write the files of manifests as loose files: `python -m fastmum.data.unpack MANIFEST ... --out DIR`."""

import argparse
import functools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmum.data.decode.image import FrameError, read_file
from fastmum.data.errors import DataError
from fastmum.data.manifest import Counts, Manifest, SequenceRecord, write_manifest
from fastmum.data.processes import until_terminated
from fastmum.data.records import Frame, Source, check_names, first_rows, metadata_of, new_manifest, open_source, record
from fastmum.data.spread import add_arguments, cluster, spread
from fastmum.data.store import is_url
from fastmum.errors import program, writing
from fastmum.files import atomic_path, expand_user
from fastmum.progress import progress_bar

ROWS = 1000  # frames of a task


class Files(NamedTuple):
    """Files to be written: a task of `write_files`."""

    source: Source
    out: Path
    rows: np.ndarray  # (n,) int64, of the manifest


def write_files(files: Files) -> int:
    """Write files that are not there yet, and return the number of frames. A picklable task.

    DataError: a file cannot be read, or not be written, or another file has its path.
    """
    manifest = open_source(files.source)
    for row in files.rows.tolist():
        frame = Frame(manifest, row)
        for column, source in frame.files.items():
            path = frame.side if column == "side" else manifest.paths(column, np.array([row]))[0]
            target = files.out / path
            try:
                data = read_file(source)
            except FrameError as error:
                raise DataError(f"'{source}' cannot be read ({error}); restore it") from None
            with writing(target, DataError):
                if target.exists():
                    if target.stat().st_size == len(data) and target.read_bytes() == data:
                        continue
                    raise DataError(f"'{target}' exists, but has other bytes than '{source}'; give another --out")
                target.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(target) as partial:
                    partial.write_bytes(data)
    return len(files.rows)


def unpack(
    manifest: str | Path, out: str | Path, *, workers: int = 1, ray: str | None = None, progress: bool = False
) -> Counts:
    """Write all files below a folder, with the paths that they had before they were packed, and a manifest of them.

    Files of an interrupted call are kept. DataError: a file cannot be read, or not be written, or a file of other bytes
    has its path.
    """
    if is_url(out):
        raise DataError(f"--out is '{out}', but files are unpacked into a folder; upload it then")
    source, out = Manifest(manifest), Path(os.path.abspath(expand_user(out)))
    made = new_manifest(source, out)
    rows = np.unique(first_rows(source))
    tasks = [Files(Source.of(source), out, some) for some in np.array_split(rows, -(-len(rows) // ROWS))]
    with progress_bar(total=len(rows), unit="frame", desc=source.stem, show=progress) as bar:
        out.mkdir(parents=True, exist_ok=True)
        for count in spread(write_files, tasks, workers=workers, ray=ray, paths=(source.given, source.root, out)):
            bar.update(count)

    def records() -> Iterator[SequenceRecord]:
        for sequence in range(source.num_sequences):
            rows = np.arange(*source.starts[sequence : sequence + 2])
            yield record(source, sequence, rows)._replace(sides=None)

    about = metadata_of(source)
    return write_manifest(made, records(), dataset=source.datasets[0], root=Path("."), metadata=about)


def _command(args: argparse.Namespace) -> None:
    check_names(args.manifests)
    with cluster(args.ray, args.workers):
        for file in args.manifests:
            sequences, frames = unpack(file, args.out, workers=args.workers, ray=args.ray, progress=True)
            print(f"{Path(args.out, Path(file).name)}: {sequences} sequences, {frames} frames")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    description = "Write the files of manifests as loose files, the inverse of packing them."
    parser = argparse.ArgumentParser(prog=program("fastmum.data.unpack"), description=description)
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST", help="manifests, such as those of packed shards")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the files and their manifests")
    add_arguments(parser)
    args = parser.parse_args(argv)
    return until_terminated(functools.partial(_command, args), "files are kept, and the same command goes on")


if __name__ == "__main__":
    import fastmum.data.unpack  # tasks are pickled by the name of their module

    sys.exit(fastmum.data.unpack.main())
