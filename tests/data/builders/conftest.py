"""Miniatures of data sets on disk, and the sequences that their builders make of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmum.data.build import build
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import Manifest


class Found:
    """A manifest as Python objects; cameras, depth maps and masks by the name of a sequence."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.root = manifest.root
        names = [manifest.sequence_name(i) for i in range(manifest.num_sequences)]
        ends = zip(manifest.starts[:-1].tolist(), manifest.starts[1:].tolist(), strict=True)
        self.rows = {name: range(*each) for name, each in zip(names, ends, strict=True)}
        self.sequences = {name: [self._path(f) for f in manifest.files(rows)] for name, rows in self.rows.items()}
        self.lengths = {name: len(rows) for name, rows in self.rows.items()}

    def _path(self, file: Path | None) -> str | None:
        return file and file.relative_to(self.root).as_posix()

    def poses(self, name: str) -> list[np.ndarray | None]:
        return [self.manifest.camera_arrays(row)[1] for row in self.rows[name]]

    def intrinsics(self, name: str) -> list[np.ndarray | None]:
        return [self.manifest.camera_arrays(row)[0] for row in self.rows[name]]

    def depths(self, name: str) -> list[str | None]:
        return [self._path((self.manifest.depth_file(row) or [None])[0]) for row in self.rows[name]]

    def depth_formats(self, name: str) -> set[DepthFormat]:
        return {found[1] for row in self.rows[name] if (found := self.manifest.depth_file(row))}

    def masks(self, name: str) -> list[str | None]:
        return [self._path(self.manifest.mask_file(row)) for row in self.rows[name]]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Folder of the data set."""
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@pytest.fixture
def add(raw: Path) -> Callable[..., None]:
    """Makes files of the data set: empty, with a text, or images of a size (width, height)."""

    def make(*names: str, content: str | None = None, size: tuple[int, int] | None = None) -> None:
        for name in names:
            (raw / name).parent.mkdir(parents=True, exist_ok=True)
            if size:
                Image.new("RGB", size).save(raw / name)
            else:
                (raw / name).write_text(content or "")

    return make


@pytest.fixture
def found(raw: Path, tmp_path: Path) -> Callable[..., Found]:
    """Builds a data set and opens the manifest."""

    def make(name: str, **options) -> Found:
        build(name, raw, tmp_path / f"{name}.arrow", **options)
        return Found(Manifest(tmp_path / f"{name}.arrow"))

    return make
