"""Verify the files of a manifest of archives or a store: lengths, and the checksums that are known."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from fastmum.data import remote
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifest
from fastmum.data.spread import spread
from fastmum.data.store import WHOLE, Place, fetch, is_url, place_of
from fastmum.progress import progress_bar

THREADS = 16  # that read archives, or list folders: network file systems have a high latency
INDEX_SCHEMA = pa.schema({
    "name": pa.string(), "row": pa.int64(), "column": pa.string(), "offset": pa.int64(), "length": pa.int64(),
    "check": pa.uint32(), "hash": pa.uint64(), "scale_x": pa.float64(), "scale_y": pa.float64(),
})  # fmt: skip


class Members(NamedTuple):
    """Files of one archive, or those that are in none: a task of `damaged_members`."""

    archive: str
    files: tuple[tuple[str, Place], ...]  # paths and places
    packed: bool = False  # so that the archive has an index


def members_of(manifest: Manifest, column: str) -> Iterator[Members]:
    """The different files of a column ("path", "depth", "mask", "side") by their archive."""
    packed = bool(manifest.metadata.get("packed"))
    present = np.ones(manifest.num_frames, bool) if column == "path" else manifest.present(column)
    groups: dict[str, dict[Place, str]] = defaultdict(dict)
    for rows in np.array_split(np.flatnonzero(present), max(1, len(present) // 4096)):
        for path in manifest.column_files(column, rows):
            place = place_of(path)
            groups[place.store][place] = str(path)
    whole: list[tuple[str, Place]] = []
    for archive, files in groups.items():
        found = tuple((path, place) for place, path in sorted(files.items()))
        if len(found) == 1 and found[0][1].length == WHOLE:
            whole += found
        else:
            yield Members(archive, found, packed)
    for i in range(0, len(whole), 1024):
        yield Members("", tuple(whole[i : i + 1024]))


def damaged_members(members: Members) -> list[str]:
    """A line for each file that cannot be read, or is another than the one that was packed. A picklable task.

    Reads all of them. The checksums are those of the archive's index, if there is one next to it, as a packed one has.
    """
    hashes: dict[tuple[int, int], int] = {}
    index = f"{members.archive.removesuffix('.tar')}.index"
    found = []
    if members.archive.endswith(".tar"):
        try:
            table = read_index(index)
            places = zip(table["offset"].to_pylist(), table["length"].to_pylist(), strict=True)
            hashes = dict(zip(places, table["hash"].to_pylist(), strict=True))
        except FileNotFoundError:
            if members.packed:
                found.append(f"'{index}' is missing, so that checksums cannot be compared; pack again")
        except (OSError, DataError) as error:
            found.append(str(error))
    for path, place in members.files:
        try:
            content = fetch(place)
        except OSError as error:
            found.append(f"'{path}': {error.strerror}")
            continue
        if hashes and hashes.get((place.offset, place.length)) != xxhash.xxh3_64_intdigest(content):
            known = (place.offset, place.length) in hashes
            found.append(f"'{path}' {'has another checksum than' if known else 'is not'} in '{index}'; pack again")
    return found


def find_damaged(
    manifest: Manifest, column: str, progress: bool = False, threads: int = THREADS, ray: str | None = None
) -> tuple[int, list[str]]:
    """Number of the different files of a column, and a line for each damaged or missing one.

    Reads in this many threads, or on a Ray cluster.
    """
    groups = list(members_of(manifest, column))
    total, found = sum(len(group.files) for group in groups), []
    with progress_bar(total=total, desc="checking", show=progress) as bar:
        checked = spread(damaged_members, groups, threads=threads, ray=ray, paths=(manifest.root,))
        for group, lines in zip(groups, checked, strict=True):
            found += lines
            bar.update(len(group.files))
    return total, found


def read_index(file: str) -> pa.Table:
    """The members of a shard; DataError: it is no index, OSError: it cannot be read."""
    content = remote.read(file) if is_url(file) else Path(file).read_bytes()
    try:
        table = pa.ipc.open_file(content).read_all()
        if table.schema.remove_metadata() != INDEX_SCHEMA:
            raise pa.ArrowInvalid("other columns")
        return table
    except pa.ArrowException:
        raise DataError(f"'{file}' is no index of a shard, or is damaged; pack again") from None
