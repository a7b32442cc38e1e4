"""Image files of a data set in folders, or in tar and zip archives, which are read in place without unpacking them."""

import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from fastmum.data.builders.base import is_image, walk
from fastmum.data.decode.image import FrameError, read_file
from fastmum.data.errors import DataError, reading
from fastmum.features import file_key

ARCHIVES = (".tar", ".zip")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
ZIP_HEADER = struct.Struct("<26xHH")  # of a member; the lengths of its name and its extra field


class File(NamedTuple):
    """A file in a folder, or a range of bytes of an archive."""

    name: str  # its path below the place that it was listed from
    place: str  # folder or archive
    member: str = ""  # its path below the folder
    offset: int = -1  # in the archive; for zip that of the member's header
    size: int = 0  # bytes in the archive
    zipped: int = -1  # compression of a zip's member

    @property
    def path(self) -> str:
        """For messages: its name below the folder or archive."""
        return f"{self.place}/{self.name}"

    def read(self) -> bytes:
        """The content; FrameError if it cannot be read."""
        if self.offset < 0:
            return read_file(Path(self.place, self.member))
        try:
            with open(self.place, "rb") as archive:
                archive.seek(self.offset)
                if self.zipped >= 0:
                    archive.seek(sum(ZIP_HEADER.unpack(archive.read(ZIP_HEADER.size))), os.SEEK_CUR)
                content = archive.read(self.size)
            return zlib.decompress(content, -zlib.MAX_WBITS) if self.zipped == zipfile.ZIP_DEFLATED else content
        except (OSError, struct.error, zlib.error) as error:
            raise FrameError(getattr(error, "strerror", None) or str(error)) from None

    def key(self) -> str:
        """A key of the content for caches, as `file_key`; FrameError if there is no such file."""
        try:
            return file_key(Path(self.place, self.member)) + (f" {self.offset}" if self.offset >= 0 else "")
        except OSError as error:
            raise FrameError(error.strerror or str(error)) from None


class Tree:
    """A data set at a path: a folder, in which archives may stand for folders of their name, or an archive of all.

    DataError: there is no such path, or an archive is damaged or compressed as a whole.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.exists():
            raise DataError(f"there is no '{root}'")
        self._archive = None if root.is_dir() else _members(root)

    def files(self, *folders: str, images: bool = True) -> list[File]:
        """Files (`images`: only those) below the first of the folders that exists, sorted by folder and name."""
        for folder in folders:
            prefix, found = f"{folder}/" if folder else "", list[File]()
            if self._archive is not None:
                found = [f._replace(name=f.name[len(prefix) :]) for f in self._archive if f.name.startswith(prefix)]
            elif (path := self.root / folder).is_dir():
                place = str(path)
                for below, names in walk(path):
                    start = "" if below == "." else f"{below}/"
                    found += [File(file, place, file) for file in (start + name for name in names)]
            else:
                archives = (path.with_name(path.name + suffix) for suffix in ARCHIVES)
                found = next((_members(archive) for archive in archives if archive.is_file()), found)
            kept = [file for file in found if is_image(file.name.rpartition("/")[2])] if images else found
            if kept:
                return sorted(kept, key=lambda file: file.name.rpartition("/"))
        return []

    def lookup(self, *folders: str) -> Callable[[str], File]:
        """Finds files below the first of some folders that exists by their paths; a missing one cannot be read."""
        path = next((self.root / folder for folder in folders if (self.root / folder).is_dir()), None)
        if path is not None:
            return lambda name: File(name, str(path), name)
        found = {file.name: file for file in self.files(*folders, images=False)}
        return lambda name: found.get(name, File(name, str(self.root / folders[0]), name))

    def folders(self, *folders: str) -> list[str]:
        """Names of the sub-folders of the first of some folders that exists, also of empty ones; sorted."""
        path = next((self.root / folder for folder in folders if (self.root / folder).is_dir()), None)
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path else []

    def text(self, *names: str) -> str | None:
        """The content of the first of some files that exists, None if there is none."""
        for name in names:
            if self._archive is None and (self.root / name).is_file():
                with reading(self.root / name, "text"):
                    return (self.root / name).read_text(encoding="utf-8-sig")
            if file := next((file for file in self._archive or () if file.name == name), None):
                return file.read().decode("utf-8-sig")
        return None

    def compressed(self, *folders: str) -> str:
        """A remark on archives that stand for one of the folders, but cannot be read in place; empty if none does."""
        paths = (self.root / (folder + suffix) for folder in folders for suffix in COMPRESSED)
        return next((f"; unpack '{path.name}', which is compressed as a whole" for path in paths if path.is_file()), "")


def _members(archive: Path) -> list[File]:
    """Files in an archive, also in tar files inside a tar file (ImageNet's), below folders of their names."""
    if not archive.name.endswith(ARCHIVES):
        raise DataError(f"'{archive}' is neither a folder nor an archive of {' or '.join(ARCHIVES)}; unpack it")
    with reading(archive, "an archive"):
        try:
            found = [*(_zipped if archive.suffix == ".zip" else _tarred)(archive)]
        except (tarfile.TarError, zipfile.BadZipFile) as error:
            raise ValueError(str(error)) from None
    wrapper = f"{archive.stem}/"
    wrapped = bool(found) and all(file.name.startswith(wrapper) for file in found)
    return [file._replace(name=file.name.removeprefix(wrapper)) for file in found] if wrapped else found


def _zipped(archive: Path) -> Iterator[File]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("its members are compressed in another way than deflate")
            if not member.is_dir():
                where = member.header_offset, member.compress_size, member.compress_type
                yield File(member.filename, str(archive), "", *where)


def _tarred(archive: Path) -> Iterator[File]:
    with open(archive, "rb") as stream:
        yield from _in_tar(stream, str(archive), "", 0)


def _in_tar(stream: IO[bytes], place: str, prefix: str, start: int) -> Iterator[File]:
    stream.seek(start)
    with tarfile.open(fileobj=stream, mode="r:") as opened:
        for member in opened:
            name = prefix + member.name.removeprefix("./")
            if member.isreg() and name.endswith(".tar"):
                yield from _in_tar(stream, place, f"{name.removesuffix('.tar')}/", member.offset_data)
            elif member.isreg():
                yield File(name, place, "", member.offset_data, member.size)
