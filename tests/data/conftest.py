"""Image files, the decoders that run on a CPU, and manifests of loose files and of shards."""

import pytest
import skimage.data
from PIL import Image
from stored import SMALL

from fastmum.data import staging
from fastmum.data.build import build
from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import ORIENTATION
from fastmum.data.depth import DepthFormat
from fastmum.data.manifest import SequenceRecord, write_manifest
from fastmum.data.pack import pack


@pytest.fixture
def dali():
    """The module that needs DALI."""
    return pytest.importorskip("fastmum.data.decode.dali", reason="DALI is not installed")


@pytest.fixture(params=["pillow", "dali_cpu"])
def decoder(request):
    """Every decoder that runs on a CPU."""
    if request.param == "dali_cpu":
        request.getfixturevalue("dali")
    return make_decoder(request.param, 64)


@pytest.fixture(scope="session")
def photograph():
    """A photograph of 200 x 150 pixels."""
    return Image.fromarray(skimage.data.astronaut()).resize((200, 150), box=(0, 0, 512, 384))


@pytest.fixture
def save(tmp_path, photograph):
    """Writes a file of an image, by default the photograph."""

    def save(name, image=photograph, orientation=None, **options):
        exif = Image.Exif()
        if orientation:
            exif[ORIENTATION] = orientation
        image.save(tmp_path / name, **{"exif": exif} | options)
        return tmp_path / name

    return save


@pytest.fixture
def no_stage():
    """Ends staging after a test."""
    yield
    staging.start(None, 0)


@pytest.fixture
def loose(image_folder, tmp_path):
    """The manifest of a folder of four scenes of six images."""
    build("folder", image_folder, tmp_path / "lists/scenes.arrow", dataset="scenes")
    return tmp_path / "lists/scenes.arrow"


@pytest.fixture
def shards(loose, tmp_path):
    """The manifest of its shards."""
    pack(loose, tmp_path / "shards", SMALL)
    return tmp_path / "shards/scenes.arrow"


@pytest.fixture
def masked(tmp_path):
    """The manifest of three frames with depth of CO3D, of which two have a depth mask, too."""
    for name, count in (("images", 3), ("depths", 3), ("depth_masks", 2)):
        (tmp_path / "co3d" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("I;16" if name == "depths" else "L", (4, 3), i + 1).save(tmp_path / f"co3d/{name}/{i}.png")
    images, depths = ([f"{name}/{i}.png" for i in range(3)] for name in ("images", "depths"))
    record = SequenceRecord("apple", images, depths=depths, depth_format=DepthFormat("co3d"))
    (tmp_path / "lists").mkdir(exist_ok=True)
    write_manifest(tmp_path / "lists/co3d.arrow", [record], dataset="co3d", root=tmp_path / "co3d", metadata={})
    return tmp_path / "lists/co3d.arrow"
