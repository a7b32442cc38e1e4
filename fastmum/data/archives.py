"""Folders with tar and zip archives in them, seen as if these were unpacked in place.

The members of an archive lie next to it, as after unpacking it there. An archive with images at its top level is a
folder of its name instead (`n01440764.tar`, WebDataset shards). Archives may lie in any folder, in tar archives too
(`ILSVRC2012_img_train.tar`), and a root may itself be an archive. Files that were unpacked come before members.
"""

import itertools
import logging
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from fastmum.data.decode.image import is_image
from fastmum.data.errors import reading
from fastmum.data.manifest_writer import SequenceRecord
from fastmum.data.records import side_path
from fastmum.data.store import BLOCK, Place, StoredPath, stat_of

log = logging.getLogger(__name__)

SUFFIXES = (".tar", ".zip")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")  # which have no random access
MOST_LISTED = 64  # archives whose lists of members are in memory
CHUNK = 1 << 20  # bytes that are read at a time after the last member of a tar
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip: signature, lengths of name and extra field
Folders = dict[str, dict[str, Place | None]]  # of an archive: files, and sub-folders (None), by folder and name


class Archive(NamedTuple):
    """An archive: a file, or a member of a tar archive."""

    place: Place
    mount: str  # folder below the tree's root that its members lie in
    tops: frozenset[str] | None  # names at its top level, None: any


class TreePath(StoredPath):
    """A path below the root of a `Tree`."""

    tree: "Tree | None" = None

    def with_segments(self, *parts: Any) -> "TreePath":
        """A path of the same tree."""
        return self._of(type(self)(*parts))

    def _of(self, path: Any) -> "TreePath":
        path.tree = self.tree
        return path

    def __truediv__(self, key: Any) -> "TreePath":
        return self._of(super().__truediv__(key))

    @property
    def parent(self) -> "TreePath":
        """The folder."""
        return self._of(super().parent)

    def __reduce__(self) -> Any:
        return _reopen, (str(self.tree.root) if self.tree else None, str(self))

    def find(self) -> Place | dict[str, Place | None] | None:
        """The place of a member, the entries of a folder in archives, None if there is neither."""
        return None if self.tree is None else self.tree.find(self)

    def entries(self, files: Collection[str]) -> dict[str, Place | None]:
        """Members, and their folders (None), of this folder, whose real files are known."""
        return {} if self.tree is None else self.tree.entries(self.tree.relative(self), files)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """That of the file, or type and size of a member."""
        try:
            found = os.stat(self, follow_symlinks=follow_symlinks)
            if self.tree is None or str(self) != str(self.tree.root):
                return found
        except (FileNotFoundError, NotADirectoryError):
            if (member := self.find()) is None:
                raise
            return stat_of(stat.S_IFREG, member.size) if isinstance(member, Place) else stat_of(stat.S_IFDIR, 0)
        return stat_of(stat.S_IFDIR, 0)  # an archive is the root

    def read_bytes(self) -> bytes:
        """The content of the file or member."""
        with self.open("rb") as stream:
            return stream.read()

    def open(self, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> IO[Any]:  # type: ignore[override]
        """A stream of the file or the member."""
        try:
            return open(str(self), mode, buffering, *args, **options)
        except (FileNotFoundError, NotADirectoryError):
            if not isinstance(place := self.find(), Place):
                raise
            return StoredPath.at(str(self), place).open(mode, buffering, *args, **options)


class Tree:
    """The files below a root and in its archives. Archives are listed when a folder that they may be in is asked for.

    DataError: an archive that is damaged. Files that are encrypted or compressed in unusual ways are left out, which
    is logged.
    """

    def __init__(self, root: Path, archive: Place | None = None) -> None:
        """`archive`: its place if the root is an archive in another one."""
        self.root, self._archive = root, archive
        self._archives: dict[str, list[Archive]] = {}  # by the folder that they lie in
        self._mounted: dict[str, list[Archive]] = {}  # by the folder that their members lie in
        self._stems: dict[str, dict[str, None]] = {}  # folders named after archives, by the folder these lie in
        self._folders: OrderedDict[Place, Folders] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folders": OrderedDict()}

    def path(self, path: str | Path) -> TreePath:
        """A path below the root."""
        made = TreePath(path)
        made.tree = self
        return made

    def relative(self, path: Path) -> str:
        """The path below the root, "" for the root."""
        below = os.path.relpath(path, self.root)
        return "" if below == "." else below

    def find(self, path: Path) -> Place | dict[str, Place | None] | None:
        """See `TreePath.find`."""
        relative = self.relative(path)
        if not relative:
            return self.entries("")
        if relative.startswith(".."):
            return None
        folder, _, name = relative.rpartition("/")
        for members in self._members(folder):
            if isinstance(place := members.get(name), Place):
                return place
        return self.entries(relative) or None

    def place(self, path: Path) -> Place | None:
        """The place of a member; None of a real file, or of nothing."""
        found = None if not self._mounted or os.path.exists(path) else self.find(path)
        return found if isinstance(found, Place) else None

    def entries(self, folder: str, files: Collection[str] | None = None) -> dict[str, Place | None]:
        """Members, and their folders (None), in a folder below the root; `files` are its real files if known."""
        self.archives(folder, files)
        return {name: place for members in reversed([*self._members(folder)]) for name, place in members.items()}

    def _members(self, folder: str) -> Iterator[Mapping[str, Place | None]]:
        """The entries of a folder in each archive that has it."""
        for parent in _parents(folder):
            self.archives(parent)
        yield self._stems.get(folder, {})
        yield from self._mounted_entries(folder)

    def _mounted_entries(self, folder: str) -> Iterator[dict[str, Place | None]]:
        for parent in _parents(folder):
            for archive in self._mounted.get(parent, ()):
                yield self._entries(archive, folder)

    def _entries(self, archive: Archive, folder: str) -> dict[str, Place | None]:
        below = folder.removeprefix(archive.mount).removeprefix("/")
        if below and archive.tops is not None and below.partition("/")[0] not in archive.tops:
            return {}
        return self._list(archive.place).get(below, {})

    def archives(self, folder: str, files: Collection[str] | None = None) -> list[Archive]:
        """The archives in a folder, also those in tar archives."""
        if folder in self._archives:
            return self._archives[folder]
        real, waiting = Path(self.root, folder), []
        if not folder and (self._archive or real.is_file()):  # an archive is the root
            waiting = [("", self._archive or Place(str(real)))]
        else:
            with reading(real, "a folder"):
                names = sorted(files or (os.listdir(real) if real.is_dir() else ()))
            waiting = [(name, Place(str(real / name))) for name in names if _is_archive(name)]
            if useless := [name for name in names if name.lower().endswith(COMPRESSED)]:
                log.info("'%s' and its like are not read in place: unpack them", real / useless[0])
        for parent in _parents(folder)[:-1]:
            self.archives(parent)
        for members in self._mounted_entries(folder):
            waiting += _nested(members)
        found = self._archives[folder] = []
        for name, place in waiting:  # which grows
            found.append(archive := self._open(folder, name, place))
            self._mounted.setdefault(archive.mount, []).append(archive)
            if archive.mount == folder:
                waiting += _nested(self._entries(archive, folder))
            else:
                self._stems.setdefault(folder, {})[posixpath.basename(archive.mount)] = None
        return found

    def _open(self, folder: str, name: str, place: Place) -> Archive:
        members = []
        for member, at in _members_of(place):
            if "/" not in member and is_image(member):
                stem = posixpath.join(folder, name.rpartition(".")[0])
                return Archive(place, stem if name else folder, None)
            members.append((member, at))
        return Archive(place, folder, frozenset(self._keep(place, members)[""]))

    def _list(self, place: Place) -> Folders:
        if place not in self._folders:
            return self._keep(place, _members_of(place))
        self._folders.move_to_end(place)
        return self._folders[place]

    def _keep(self, place: Place, members: Iterable[tuple[str, Place]]) -> Folders:
        folders: Folders = {"": {}}
        for member, at in members:
            folder, _, name = member.rpartition("/")
            folders.setdefault(folder, {})[name] = at
            while folder:
                above, _, name = folder.rpartition("/")
                known = above in folders
                folders.setdefault(above, {}).setdefault(name, None)
                if known and above:
                    break
                folder = above
        self._folders[place] = folders
        if len(self._folders) > MOST_LISTED:
            self._folders.popitem(last=False)
        return folders


trees: dict[str, Tree] = {}  # of this process, by root


def _reopen(root: str | None, path: str) -> TreePath:
    return trees.setdefault(root, Tree(Path(root))).path(path) if root is not None else TreePath(path)


def open_root(root: Path) -> TreePath | None:
    """A folder or archive, or a folder in an archive, as a path of a tree; None if there is no such thing."""
    container = next((path for path in (root, *root.parents) if path.exists()), None)
    if container is None or (container.is_file() and not _is_archive(container.name)):
        return None
    member = container.find() if isinstance(container, TreePath) else None
    place = member if isinstance(member, Place) else None
    if place and not _nested({container.name: place}):
        return None
    found = Tree(container, place).path(root)
    return found if found.is_dir() else None


def with_places(record: SequenceRecord, tree: Tree, root: Path) -> SequenceRecord:
    """A record, whose paths are relative to `root`, with the places of the files that are in archives."""

    def places(paths: Sequence[str]) -> list[Place | None]:
        found = [tree.place(root / path) if path else None for path in paths]
        return [at and at._replace(store=os.path.relpath(at.store, root)) for at in found]

    columns = {"path": record.frames, "depth": record.depths, "mask": record.masks}
    known = {name: at for name, paths in columns.items() if paths is not None and any(at := places(paths))}
    if record.depth_format:
        sides = [side_path(path, record.depth_format.reader) for path in record.depths or ()]
        if any(found := places(sides)):
            known["side"] = found
            record = record._replace(sides=[path if at else "" for path, at in zip(sides, found, strict=True)])
    return record._replace(places=known or None)


def _is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _nested(members: Mapping[str, Place | None]) -> list[tuple[str, Place]]:
    """The tar archives among the members of a tar archive."""
    return [(name, at) for name, at in members.items() if at and at.in_tar and name.lower().endswith(".tar")]


def _parents(folder: str) -> list[str]:
    """The folders from the root, "", to this one."""
    return ["", *itertools.accumulate(filter(None, folder.split("/")), posixpath.join)]


def _members_of(place: Place) -> Iterator[tuple[str, Place]]:
    """Path and place of every file in an archive; DataError: it is damaged."""
    read = _tar_members if place.in_tar or place.store.lower().endswith(".tar") else _zip_members
    with reading(Path(place.store), "an archive", "copy it again"):
        for name, at in read(place):
            parts = PurePosixPath(name.replace("\\", "/")).parts
            if parts and parts[0] != "/" and ".." not in parts:
                yield "/".join(parts), at


class _Part:
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        data = os.pread(self._file.fileno(), left if count < 0 else min(count, left), self._start + self._at)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at


def _tar_members(place: Place) -> Iterator[tuple[str, Place]]:
    with open(place.store, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = size if place.length < 0 else place.length
        if place.offset + length > size:
            raise ValueError("it is cut off")
        part: Any = _Part(file, place.offset, length)
        with tarfile.open(fileobj=part, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # which would all stay in memory
                if member.offset_data + member.size > length:
                    raise ValueError(f"it is cut off in '{member.name}'")
                if member.isreg() and not member.issparse():
                    start = place.offset + member.offset_data
                    check = zlib.crc32(os.pread(file.fileno(), BLOCK, start - BLOCK))
                    yield member.name, Place(place.store, start, member.size, check, size=member.size)
            end = part.seek(archive.offset)  # where `tarfile` found no other header
        while chunk := part.read(CHUNK):
            if chunk.count(0) < len(chunk):
                raise ValueError(f"it is cut off or damaged at byte {end}, or goes on after its end")
        if end + BLOCK > length:
            log.warning("'%s' lacks its end mark: copy it again if it is cut off", place.store)


def _zip_members(place: Place) -> Iterator[tuple[str, Place]]:
    with open(place.store, "rb", buffering=0) as file, zipfile.ZipFile(file) as archive:
        unread = 0
        for member in archive.infolist():
            if member.is_dir():
                continue
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                unread += 1
                continue
            header = os.pread(file.fileno(), LOCAL_HEADER.size, member.header_offset)
            if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
                raise ValueError(f"the header of '{member.filename}' is damaged")
            _, name, extra = LOCAL_HEADER.unpack(header)
            start = member.header_offset + LOCAL_HEADER.size + name + extra
            deflated = member.compress_type == zipfile.ZIP_DEFLATED
            yield (
                member.filename,
                Place(place.store, start, member.compress_size, member.CRC, deflated, member.file_size),
            )
        if unread:
            what = "files are left out, which are encrypted or not compressed by deflation; unpack them if needed"
            log.warning("'%s': %d %s", place.store, unread, what)
