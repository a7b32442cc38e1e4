"""Pack the files of manifests into tar shards: `python -m fastmum.data.pack MANIFEST ... --out DIR`.

A shard is a tar archive that `tar` and WebDataset read: a frame is a sample of `<data set>/<sequence>/<number>.jpg`,
and `.depth.png`, `.mask.png`, `.json` (cameras) of the same name. A sequence is whole in one shard, but for frames that
earlier sequences have, too, which are stored once. `<shard>.index` lists members and checksums of their content.
"""

import argparse
import contextlib
import errno
import functools
import io
import json
import logging
import os
import re
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from PIL import Image

from fastmum.data import remote
from fastmum.data.check import INDEX_SCHEMA, read_index
from fastmum.data.decode.image import (
    JPEGS,
    TRANSIENT,
    FrameError,
    jpeg_scale,
    read_file,
    read_header,
    resize,
    turn_upright,
)
from fastmum.data.errors import DataError
from fastmum.data.manifest import Counts, Manifest, write_manifest
from fastmum.data.processes import until_terminated
from fastmum.data.records import (
    Frame,
    Source,
    check_names,
    columns_of,
    first_rows,
    metadata_of,
    new_manifest,
    open_source,
    record,
)
from fastmum.data.spread import add_arguments, cluster, spread
from fastmum.data.store import BLOCK, Place, StoredPath, is_url, join, place_of
from fastmum.errors import program, some_names, writing
from fastmum.files import atomic_path
from fastmum.progress import progress_bar

log = logging.getLogger(__name__)

THREADS = 16  # that ask for the sizes of files
PROBED = 32  # images that are shrunk to estimate how many fit into a shard
AGAIN = "the same command goes on when its store works again (if only this file fails, remove it)"
NAMES = {"path": "", "depth": ".depth", "mask": ".mask", "side": ".depth_mask"}  # in the names of members


class Settings(NamedTuple):
    """How files are packed."""

    short_side: int = 0  # larger images are shrunk to this shorter side in pixels, 0: none
    quality: int = 92  # of the JPEG files that they become
    shard_gb: float = 2.0  # most bytes of a shard, unless a sequence is larger; in GB
    broken: str = "stop"  # or "skip": at a file that is missing or broken; failing stores always stop


WHOLE_FILES = Settings()


class Shard(NamedTuple):
    """A shard to be written: a task of `write_shard`."""

    source: Source
    out: str  # folder or URL
    name: str
    rows: np.ndarray  # (n,) int64, of the manifest
    settings: Settings

    @property
    def key(self) -> str:
        """What the content depends on."""
        rows = xxhash.xxh3_64_hexdigest(self.rows.tobytes())
        return f"1 {self.source.checksum} {self.name} {rows} {self.settings[:3]}"


def pack(
    manifest: str | Path, out: str | Path, settings: Settings = WHOLE_FILES, *, workers: int = 1,
    ray: str | None = None, progress: bool = False,
) -> Counts:  # fmt: skip
    """Write the shards `<stem>-000000.tar`, ..., and the manifest `<stem>.arrow`, into a folder or below a URL.

    Equal arguments give equal bytes, for any number of `workers` (processes), or nodes of the cluster `ray`. Shards
    of an interrupted call are kept.
    DataError: files that cannot be read, or not be written.
    """
    source, out = Manifest(manifest), str(out) if is_url(out) else os.path.abspath(os.path.expanduser(out))
    stem = source.stem
    if is_url(out):
        remote.check_writable(out)
    else:
        with writing(Path(out), DataError):
            Path(out).mkdir(parents=True, exist_ok=True)
        new_manifest(source, Path(out))
    groups = _groups(source, settings)
    shards = [Shard(Source.of(source), out, f"{stem}-{i:06d}", rows, settings) for i, rows in enumerate(groups)]
    if not is_url(out):
        _report_others(out, stem, {f"{shard.name}{suffix}" for shard in shards for suffix in (".tar", ".index")})
    with progress_bar(total=sum(map(len, groups)), unit="frame", desc=stem, show=progress) as bar:
        indices = []
        found = spread(write_shard, shards, workers=workers, ray=ray, paths=(source.given, source.root, out))
        for shard, index in zip(shards, found, strict=True):
            indices.append(index)
            bar.update(len(shard.rows))
    return _write_manifest(source, out, [shard.name for shard in shards], indices, settings)


def _report_others(out: str, stem: str, names: Collection[str]) -> None:
    """Log files of shards of earlier calls, finished or not, that are none of `names`."""
    ours = re.compile(rf"(\.partial-\d+-)?{re.escape(stem)}-\d{{6}}\.(tar|index)")
    if others := sorted(name for name in os.listdir(out) if ours.fullmatch(name) and name not in names):
        log.warning("'%s' has files of earlier calls, which may be deleted: %s", out, some_names(others, 4))


def _groups(manifest: Manifest, settings: Settings) -> list[np.ndarray]:
    """Rows of the shards. A shard ends with the sequence that would make it larger than it should be."""
    first = first_rows(manifest)
    new = np.flatnonzero(first == np.arange(manifest.num_frames))
    sizes = np.zeros(manifest.num_frames, np.int64)
    sizes[new] = _sizes(manifest, new) * _shrinkage(manifest, new, settings)
    of_sequence = np.add.reduceat(sizes, manifest.starts[:-1])
    limit, total, cuts = settings.shard_gb * 1e9, 0, []
    for i, size in enumerate(of_sequence.tolist()):
        if total and total + size > limit:
            cuts.append(i)
            total = 0
        total += size
    groups = np.split(new, np.searchsorted(new, manifest.starts[cuts]))
    return [rows for rows in groups if len(rows)]


def _sizes(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Bytes of the images of rows, (n,) int64, and of what belongs to them."""

    def size(row: int) -> int:
        total = 0
        for file in Frame(manifest, row).files.values():
            place = place_of(file)
            try:
                total += BLOCK + (place.length if place.length >= 0 else _size(place.store))
            except OSError as error:  # one that lasts is an error where the file is packed
                if error.errno in TRANSIENT and error.errno != errno.ENOENT:
                    raise DataError(f"'{file}' cannot be packed ({error.strerror}); {AGAIN}") from None
        return total

    with ThreadPoolExecutor(THREADS) as pool:
        return np.fromiter(pool.map(size, rows.tolist()), np.int64, len(rows))


def _size(file: str) -> int:
    """Bytes of a file or an object; OSError: there is none, or its store fails."""
    return remote.size(file) if is_url(file) else os.stat(file).st_size


def _shrinkage(manifest: Manifest, rows: np.ndarray, settings: Settings) -> float:
    """Estimated ratio of sizes after and before shrinking, from images spread over all rows."""
    before = after = 1
    for i in np.linspace(0, len(rows) - 1, min(PROBED, len(rows))).astype(int) if settings.short_side else ():
        try:
            data = read_file(manifest.file(int(rows[i])))
            before, after = before + len(data), after + len(_shrunk(data, settings)[0])
        except FrameError:
            continue
    return after / before


def _shrunk(data: bytes, settings: Settings) -> tuple[bytes, tuple[float, float]]:
    """An image, and its width and height over those of the upright image before; FrameError if it is damaged."""
    header = read_header(data)
    size = (header.width, header.height)
    if not 0 < settings.short_side < min(size):
        return data, (1.0, 1.0)
    smaller = [max(1, round(side * settings.short_side / min(size))) for side in size]
    if header.image.format in JPEGS and (scale := jpeg_scale(*size, settings.short_side)) > 1:
        header.image.draft(None, (header.image.width // scale, header.image.height // scale))
    image = Image.fromarray(resize(turn_upright(header), (smaller[1], smaller[0])))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=settings.quality)
    return stream.getvalue(), (smaller[0] / size[0], smaller[1] / size[1])


def write_shard(shard: Shard) -> pa.Table:
    """Write a shard and its index unless an equal one without skipped frames is there; returns the index.

    A picklable task. DataError: a file cannot be read (unless it is broken and to be skipped), or the shard cannot be
    written.
    """
    if (index := _finished(shard)) is not None:
        return index
    with writing(Path(shard.out, shard.name), DataError), _folder(shard.out) as folder:
        tar, listed = (Path(folder, f"{shard.name}{suffix}") for suffix in (".tar", ".index"))
        with atomic_path(tar) as partial, open(partial, "wb") as file:
            index = _write_members(shard, file)
            file.flush()
            os.fsync(file.fileno())
        about = {"fastmum.shard": shard.key, "bytes": str(tar.stat().st_size)}
        if skipped := len(shard.rows) - index["column"].to_pylist().count("path"):
            about["skipped"] = str(skipped)  # so that it is written again by the next call
        described = index.replace_schema_metadata(about)
        with atomic_path(listed) as partial, pa.ipc.new_file(str(partial), described.schema) as writer:
            writer.write_table(described)
        if is_url(shard.out):
            for each in (tar, listed):
                remote.write(join(shard.out, each.name), each)
    return index


def _folder(out: str) -> contextlib.AbstractContextManager[str]:
    """The folder itself, or a temporary one for what is uploaded."""
    return tempfile.TemporaryDirectory(prefix="fastmum-pack-") if is_url(out) else contextlib.nullcontext(out)


def _finished(shard: Shard) -> pa.Table | None:
    """The index of an equal shard that is there; None if there is none."""
    try:
        found = read_index(join(shard.out, f"{shard.name}.index"))
        tar = join(shard.out, f"{shard.name}.tar")
        size = _size(tar)
    except (OSError, DataError):
        return None
    described = {key.decode(): value.decode() for key, value in (found.schema.metadata or {}).items()}
    return found if described == {"fastmum.shard": shard.key, "bytes": str(size)} else None


def _write_members(shard: Shard, file: IO[bytes]) -> pa.Table:
    manifest, settings = open_source(shard.source), shard.settings
    found: list[tuple[Any, ...]] = []
    for row in shard.rows.tolist():
        frame = Frame(manifest, row)
        contents: dict[str, bytes] = {}
        try:
            for column, path in frame.files.items():
                contents[column] = read_file(path)
            path = frame.files["path"]
            contents["path"], scale = _shrunk(contents["path"], settings)
        except FrameError as error:
            outage = error.transient and str(error) != "missing"
            if outage or settings.broken == "stop":
                remedy = AGAIN if outage else "restore it, or pack with --broken skip"
                raise DataError(f"'{path}' cannot be packed ({error}); {remedy}") from None
            log.warning("skipped: '%s' (%s)", path, error)
            continue
        if scale != (1.0, 1.0) and frame.reader == "eth3d":
            raise DataError("depth of eth3d needs images of their own size; pack it without --short-side")
        for column, data in contents.items():
            suffix = ".jpg" if column == "path" and scale != (1.0, 1.0) else frame.files[column].suffix.lower()
            name = f"{frame.key}{NAMES[column]}{suffix or '.bin'}"
            offset, check = _add(file, name, data)
            found.append((name, row, column, offset, len(data), check, xxhash.xxh3_64_intdigest(data), *scale))
        if described := frame.described(scale):
            _add(file, f"{frame.key}.json", json.dumps(described, sort_keys=True).encode())
    file.write(bytes(2 * BLOCK))  # the end of a tar archive
    columns = zip(*found, strict=True) if found else [()] * len(INDEX_SCHEMA)
    return pa.table(
        [pa.array(values, kind) for values, kind in zip(columns, INDEX_SCHEMA.types, strict=True)], INDEX_SCHEMA
    )


def _add(file: IO[bytes], name: str, data: bytes) -> tuple[int, int]:
    """Append a member to a tar archive; returns where its content begins, and the CRC-32 of its header."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644  # and no time, owner or group
    header = member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    file.write(header)
    offset = file.tell()
    file.write(data + bytes(-len(data) % BLOCK))
    return offset, zlib.crc32(header[-BLOCK:])


def _write_manifest(
    source: Manifest, out: str, names: Sequence[str], indices: Sequence[pa.Table], settings: Settings
) -> Counts:
    """Write the manifest of all frames that were packed."""
    columns = columns_of(source)
    archive = {column: np.full(source.num_frames, -1, np.int32) for column in columns}
    places = {column: np.zeros((source.num_frames, 3), np.int64) for column in columns}
    scales = np.ones((source.num_frames, 2), np.float32)
    for number, index in enumerate(indices):
        of = np.array(index["column"].to_pylist())
        fields = [index[key].to_numpy() for key in ("row", "offset", "length", "check", "scale_x", "scale_y")]
        for column in columns:
            rows, *values = (field[of == column] for field in fields)
            archive[column][rows] = number
            places[column][rows] = np.stack(values[:3], axis=1)
            scales[rows] = np.stack(values[3:], axis=1)
    first = first_rows(source)
    skipped = int(np.count_nonzero(archive["path"][np.unique(first)] < 0))
    if skipped:
        log.warning("%d images were skipped", skipped)

    def records() -> Iterator[Any]:
        for sequence in range(source.num_sequences):
            rows = np.arange(*source.starts[sequence : sequence + 2])
            rows = rows[archive["path"][first[rows]] >= 0]
            if not len(rows):
                continue
            made, packed = record(source, sequence, rows), first[rows]
            if made.intrinsics is not None:
                made = made._replace(intrinsics=made.intrinsics * np.tile(scales[packed], 2))
            at = {column: _places(names, archive[column][packed], places[column][packed]) for column in columns}
            if made.sides is not None:  # some may not be there
                sides = [path if place else "" for path, place in zip(made.sides, at["side"], strict=True)]
                made = made._replace(sides=sides)
            yield made._replace(places=at)

    metadata = metadata_of(source) | {"packed": settings._asdict()}
    with _folder(out) as folder:
        file = Path(folder, f"{source.stem}.arrow")
        root = StoredPath(out) if is_url(out) else Path(".")
        counts = write_manifest(file, records(), dataset=source.datasets[0], root=root, metadata=metadata)
        if is_url(out):
            remote.write(join(out, file.name), file)
    return counts


def _places(names: Sequence[str], archives: np.ndarray, places: np.ndarray) -> list[Place | None]:
    return [
        Place(f"{names[number]}.tar", *place) if number >= 0 else None
        for number, place in zip(archives.tolist(), places.tolist(), strict=True)
    ]


def _command(args: argparse.Namespace) -> None:
    settings = Settings(args.short_side, args.quality, args.shard_gb, args.broken)
    check_names(args.manifests)
    if not 1 <= args.quality <= 95 or args.short_side < 0 or args.shard_gb <= 0:
        raise DataError("--quality must be 1 to 95, --short-side at least 0, and --shard-gb above 0")
    with cluster(args.ray, args.workers):
        for file in args.manifests:
            sequences, frames = pack(file, args.out, settings, workers=args.workers, ray=args.ray, progress=True)
            print(f"{join(args.out, f'{Path(file).stem}.arrow')}: {sequences} sequences, {frames} frames")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    description = "Pack the files of manifests into tar shards, and write the manifests that point into them."
    parser = argparse.ArgumentParser(prog=program("fastmum.data.pack"), description=description)
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST", help="manifests of any files")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder, or URL of a store (s3://bucket/folder)")
    side = "shrink larger images to this shorter side in pixels, as JPEG (default 0: keep all bytes)"
    parser.add_argument("--short-side", type=int, default=0, metavar="N", help=side)
    parser.add_argument("--quality", type=int, default=92, help="of shrunk images (default %(default)s)")
    parser.add_argument(
        "--shard-gb", type=float, default=2.0, metavar="G", help="size of a shard (default %(default)s)"
    )
    broken = "at a file that is missing or broken (default %(default)s); stores that fail always stop"
    parser.add_argument("--broken", choices=("stop", "skip"), default="stop", help=broken)
    add_arguments(parser)
    args = parser.parse_args(argv)
    left = "finished shards are kept, and the same command goes on"
    return until_terminated(functools.partial(_command, args), left)


if __name__ == "__main__":
    import fastmum.data.pack  # tasks are pickled by the name of their module

    sys.exit(fastmum.data.pack.main())
