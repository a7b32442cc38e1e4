"""Miniatures of data sets on disk, and the sequences that their builders make of them."""

import pytest
from PIL import Image

from fastmum.data.build import build
from fastmum.data.manifest import Manifest


class Found:
    """A manifest as Python objects; cameras, depth maps and masks by the name of a sequence."""

    def __init__(self, manifest):
        self.manifest, self.root = manifest, manifest.root
        starts = manifest.starts.tolist()
        self.rows = {manifest.sequence_name(i): range(*starts[i : i + 2]) for i in range(manifest.num_sequences)}
        self.sequences = {name: [self._path(f) for f in manifest.files(rows)] for name, rows in self.rows.items()}
        self.lengths = {name: len(rows) for name, rows in self.rows.items()}

    def _path(self, file):
        return file and file.relative_to(self.root).as_posix()

    def poses(self, name):
        return [self.manifest.camera_arrays(row)[1] for row in self.rows[name]]

    def intrinsics(self, name):
        return [self.manifest.camera_arrays(row)[0] for row in self.rows[name]]

    def depths(self, name):
        return [self._path((self.manifest.depth_file(row) or [None])[0]) for row in self.rows[name]]

    def depth_formats(self, name):
        return {found[1] for row in self.rows[name] if (found := self.manifest.depth_file(row))}

    def masks(self, name):
        return [self._path(self.manifest.mask_file(row)) for row in self.rows[name]]


@pytest.fixture
def raw(tmp_path):
    """Folder of the data set."""
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


@pytest.fixture
def add(raw):
    """Makes files of the data set: empty, with a text, or images of a size (width, height)."""

    def make(*names, content="", size=None):
        for name in names:
            (raw / name).parent.mkdir(parents=True, exist_ok=True)
            if size:
                Image.new("RGB", size).save(raw / name)
            else:
                (raw / name).write_text(content)

    return make


@pytest.fixture
def found(raw, tmp_path):
    """Builds a data set and opens the manifest."""

    def make(name, **options):
        build(name, raw, tmp_path / f"{name}.arrow", **options)
        return Found(Manifest(tmp_path / f"{name}.arrow"))

    return make
