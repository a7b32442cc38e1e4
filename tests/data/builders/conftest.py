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
    """A manifest as Python objects."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.root = manifest.root
        names = [manifest.sequence_name(i) for i in range(manifest.num_sequences)]
        spans = zip(manifest.starts[:-1].tolist(), manifest.starts[1:].tolist(), strict=True)
        self.rows = {name: range(*span) for name, span in zip(names, spans, strict=True)}
        self.sequences = {
            name: [file.relative_to(self.root).as_posix() for file in manifest.files(rows)]
            for name, rows in self.rows.items()
        }
        self.lengths = {name: len(rows) for name, rows in self.rows.items()}

    def depths(self, name: str) -> list[str | None]:
        found = [self.manifest.depth_file(row) for row in self.rows[name]]
        return [file and file[0].relative_to(self.root).as_posix() for file in found]

    def depth_format(self, name: str, frame: int = 0) -> DepthFormat:
        return self.manifest.depth_file(self.rows[name][frame])[1]

    def masks(self, name: str) -> list[str | None]:
        files = [self.manifest.mask_file(row) for row in self.rows[name]]
        return [file and file.relative_to(self.root).as_posix() for file in files]

    def poses(self, name: str) -> list[np.ndarray | None]:
        return [self.manifest.camera_arrays(row)[1] for row in self.rows[name]]

    def intrinsics(self, name: str) -> list[np.ndarray | None]:
        return [self.manifest.camera_arrays(row)[0] for row in self.rows[name]]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Folder of the data set."""
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@pytest.fixture
def add(raw: Path) -> Callable[..., None]:
    """Makes files of the data set: empty ones, or with a text, or images of a size (width, height)."""

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
        return Found(Manifest.open(tmp_path / f"{name}.arrow"))

    return make
