"""Files of a data set as distributed: in folders, in archives that stand for folders, or in one archive of all."""

import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from fastmum.data.archives import COMPRESSED, SUFFIXES, TreePath, open_root
from fastmum.data.builders.base import SYSTEM_FOLDERS, folders_in, walk
from fastmum.data.decode.image import FrameError, is_image, read_file
from fastmum.data.errors import DataError, reading
from fastmum.data.store import Place, StoredPath
from fastmum.features import file_key


class File(NamedTuple):
    """A file in a folder, or in an archive as if it were unpacked."""

    name: str  # its path below the folder
    folder: str
    place: Place | None = None  # in an archive

    @property
    def path(self) -> str:
        """For messages: the path of the file, as if archives were folders."""
        return f"{self.folder}/{self.name}"

    def read(self) -> bytes:
        """The content; FrameError if it cannot be read."""
        return read_file(Path(self.path) if self.place is None else StoredPath.at(self.path, self.place))

    def key(self) -> str:
        """A key of the content for caches, as `file_key`; FrameError if there is no such file."""
        try:
            if self.place is None:
                return file_key(Path(self.path))
            return f"{file_key(Path(self.place.store))} {self.place.offset}"
        except OSError as error:
            raise FrameError(error.strerror or str(error)) from None


class DataSet:
    """A data set at a path: a folder, in which archives may stand for folders of their name, or an archive of all.

    Archives are read as by `fastmum.data.archives`. DataError: there is no such path, or an archive is damaged or
    compressed as a whole.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.exists():
            raise DataError(f"there is no '{root}'")
        archive = None if root.is_dir() else _opened(root)
        top, inner = (root, []) if archive is None else (archive, _folders(archive))
        # The only folder of an archive of all may be the data set itself, under any name.
        self._tops = [top, *(top / name for name in inner if len(inner) == 1)]
        self._found: dict[str, Path | None] = {}

    def _find(self, *folders: str) -> Path | None:
        """The first of some folders that exists, or an archive that stands for it; None if there is none."""
        for folder in folders:
            if folder not in self._found:
                tops = self._tops if folder else self._tops[::-1]  # the inner one has it all
                path = next((path for top in tops if (path := top / folder).is_dir()), None)
                archives = (top / (folder + suffix) for top in self._tops for suffix in SUFFIXES)
                if path is not None:  # archives in it stand for folders, too
                    self._found[folder] = path if isinstance(path, TreePath) else open_root(path)
                else:
                    inside = self._inside(folder)  # of an archive that stands for a folder above
                    self._found[folder] = next((_opened(each) for each in archives if each.is_file()), inside)
            if found := self._found[folder]:
                return found
        return None

    def _inside(self, path: str) -> Path | None:
        above, slash, name = path.rpartition("/")
        found = self._find(above) if slash else None
        return found / name if found is not None and (found / name).exists() else None

    def files(self, *folders: str) -> list[File]:
        """Images below the first of the folders that has any, sorted by folder and name."""
        for folder in folders:
            found = _listed(path) if (path := self._find(folder)) else ()
            if images := [file for file in found if is_image(file.name.rpartition("/")[2])]:
                return sorted(images, key=lambda file: file.name.rpartition("/"))
        return []

    def lookup(self, *folders: str) -> Callable[[str], File]:
        """Finds files below the first of some folders that exists by their paths; a missing one cannot be read."""
        path = self._find(*folders) or self.root / folders[0]

        @cache
        def listed() -> dict[str, File]:
            return {file.name: file for file in _listed(path)} if isinstance(path, TreePath) else {}

        def look(name: str) -> File:
            file = File(name, str(path))
            return file if os.path.exists(file.path) else listed().get(name, file)

        return look

    def folders(self, *folders: str) -> list[str]:
        """Names of the visible sub-folders of the first of some folders that exists, also of empty ones."""
        return folders_in(self._find(*folders) or self.root / folders[0])

    def file(self, *names: str) -> Path | None:
        """The first of some files that exists, None if there is none."""
        plain, inside = (top / name for name in names for top in self._tops), (self._inside(name) for name in names)
        return next((file for file in chain(plain, inside) if file is not None and file.is_file()), None)

    def text(self, *names: str) -> str | None:
        """The content of the first of some files that exists, None if there is none."""
        if (file := self.file(*names)) is None:
            return None
        with reading(file, "text"):
            return file.read_text(encoding="utf-8-sig")

    def compressed(self, *folders: str) -> str:
        """A remark on archives that stand for one of the folders, but cannot be read in place; empty if none does."""
        paths = (self.root / (folder + suffix) for folder in folders for suffix in COMPRESSED)
        return next((f"; unpack '{path.name}', which is compressed as a whole" for path in paths if path.is_file()), "")


def _opened(archive: Path) -> TreePath:
    """An archive as a folder, or the folder of the archive's name that holds all of it."""
    found = open_root(archive)
    if found is None:
        raise DataError(f"'{archive}' is neither a folder nor an archive of {' or '.join(SUFFIXES)}; unpack it")
    return found / archive.stem if _folders(found) == [archive.stem] else found


def _folders(archive: TreePath) -> list[str]:
    """The folders in an archive, none if it has files beside them; what macOS adds does not count."""
    entries = {
        name: each for name, each in archive.entries(()).items()
        if name.lower() not in SYSTEM_FOLDERS and not name.startswith(".")
    }  # fmt: skip
    return [*entries] if all(each is None for each in entries.values()) else []


def _listed(folder: Path) -> Iterator[File]:
    for below, names in walk(folder, level=logging.WARNING):  # a class may be called "thumbs"
        path, start = folder / below, "" if below == "." else f"{below}/"
        places = path.entries(()) if isinstance(path, TreePath) else {}
        yield from (File(start + name, str(folder), places.get(name)) for name in names)
