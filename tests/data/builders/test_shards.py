"""Depth, masks and cameras of every builder, after files were packed into shards and after they were unpacked again."""

import shutil

import pytest
from test_depth_and_cameras import test_the_world_point_of_a_pixel  # noqa: F401

import fastmum.data.build as builds
from fastmum.data.manifest import Manifest
from fastmum.data.pack import pack
from fastmum.data.store import StoredPath
from fastmum.data.unpack import unpack


@pytest.fixture(params=["packed", "unpacked"], autouse=True)
def packed(request, monkeypatch, tmp_path):
    """The imported test sees packed or unpacked files only; what they were made from is gone."""
    build = builds.build

    def build_packed(name, raw, out, **options):
        built = build(name, raw, tmp_path / "folders" / out.name, **options)
        shards = out.parent if request.param == "packed" else tmp_path / "shards"
        assert pack(tmp_path / "folders" / out.name, shards) == built.counts
        if request.param == "unpacked":
            assert unpack(shards / out.name, out.parent) == built.counts
            shutil.rmtree(shards)
        for gone in (raw, tmp_path / "folders"):
            shutil.rmtree(gone)
        assert isinstance(Manifest(out).file(0), StoredPath) == (request.param == "packed")
        return built

    monkeypatch.setattr(builds, "build", build_packed)
