"""Miniatures of data sets on disk, and the sequences that their builders make of them."""

from types import SimpleNamespace

import pytest
from PIL import Image

import fastmum.data.build as builds
from fastmum.data.manifest import Manifest


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
    """Builds a data set; returns its manifest as Python objects: cameras, depth and masks by the name of a sequence."""

    def make(name, **options):
        builds.build(name, raw, tmp_path / f"{name}.arrow", **options)
        manifest = Manifest(tmp_path / f"{name}.arrow")
        starts = manifest.starts.tolist()
        rows = {manifest.sequence_name(i): range(*starts[i : i + 2]) for i in range(manifest.num_sequences)}

        def path(file):
            return file and file.relative_to(manifest.root).as_posix()

        def of_sequence(read):
            return lambda name: [read(row) for row in rows[name]]

        return SimpleNamespace(
            manifest=manifest,
            rows=rows,
            lengths={name: len(each) for name, each in rows.items()},
            sequences={name: [path(manifest.file(row)) for row in each] for name, each in rows.items()},
            intrinsics=of_sequence(lambda row: manifest.camera_arrays(row)[0]),
            poses=of_sequence(lambda row: manifest.camera_arrays(row)[1]),
            depths=of_sequence(lambda row: path((manifest.depth_file(row) or [None])[0])),
            depth_formats=lambda name: {each[1] for row in rows[name] if (each := manifest.depth_file(row))},
            masks=of_sequence(lambda row: path(manifest.mask_file(row))),
        )

    return make
