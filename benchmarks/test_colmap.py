"""Sequences from a large COLMAP model: each step, and the whole build."""

import numpy as np
import pytest

from benchmarks.sizes import Sizes
from benchmarks.synthetic_scene import draw_scene, write_binary_model
from fastmum.data.build import build
from fastmum.data.colmap import read_model
from fastmum.data.rules import angle_chains, count_shared, nearest_of_anchor, overlap_chains


@pytest.fixture(scope="module")
def size(sizes: Sizes):
    """Images and points."""
    return {"quick": (200, 20_000), "laptop": (1000, 300_000), "paper": (3000, 1_000_000)}[sizes.name]


@pytest.fixture(scope="module")
def root(tmp_path_factory, size):
    """MegaDepth's layout with one scene; its model is stored as text and as binary."""
    pycolmap = pytest.importorskip("pycolmap")
    root = tmp_path_factory.mktemp("megadepth")
    scene = root / "Undistorted_SfM/0000"
    write_binary_model(draw_scene(*size), scene / "sparse")
    (scene / "sparse-txt").mkdir()
    pycolmap.Reconstruction(scene / "sparse").write_text(scene / "sparse-txt")
    (scene / "images").mkdir()
    for i in range(size[0]):
        (scene / "images" / f"{i:06d}.jpg").touch()
    return root


@pytest.fixture(scope="module")
def model(root):
    return read_model(root / "Undistorted_SfM/0000/sparse")


@pytest.fixture(scope="module")
def overlap(model, size):
    return count_shared(model.images, model.points, size[0])


@pytest.mark.parametrize("kind", ["sparse", "sparse-txt"], ids=["binary", "text"])
def test_reading(benchmark, root, kind):
    model = benchmark.pedantic(read_model, (root / "Undistorted_SfM/0000" / kind,), rounds=1)
    benchmark.extra_info["observations"] = len(model.images)


def test_overlap(benchmark, model, size):
    overlap = benchmark.pedantic(count_shared, (model.images, model.points, size[0]), rounds=3)
    benchmark.extra_info["pairs that share points"] = len(overlap.shared) // 2


@pytest.mark.parametrize("rule", [overlap_chains, nearest_of_anchor], ids=["paper", "released"])
def test_a_thousand_sequences(benchmark, overlap, rule):
    chains = benchmark.pedantic(lambda: rule(overlap, np.random.default_rng(0)), rounds=3)
    benchmark.extra_info["frames"] = sum(map(len, chains))


def test_chains_of_angles(benchmark, overlap, model):
    chains = benchmark.pedantic(angle_chains, (overlap, model.poses[:, :3, :3]), rounds=3)
    benchmark.extra_info["frames"] = sum(map(len, chains))


def test_build(benchmark, root, tmp_path):
    built = benchmark.pedantic(build, ("megadepth", root, tmp_path / "out.arrow"), rounds=1)
    benchmark.extra_info["frames"] = built.counts.frames
