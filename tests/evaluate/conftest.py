"""Pairs in front of a wall, a rendered scene, and an encoder that sees colours."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from plane_world import Shot, walk
from torch import Tensor, nn

from fastmum.evaluate.pairs import Pair, PairSet
from fastmum.geometry import relative_pose
from fastmum.scenes import ensure_scenes


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a rendered scene of 6 views at 96 pixels, and of its copy under another name."""
    root = ensure_scenes(1, 6, 96, 0, cache_dir=tmp_path_factory.mktemp("evaluated"), workers=1)
    shutil.copytree(root / "scene_0000", root / "scene_0001")
    return root


@pytest.fixture
def wall_pairs() -> PairSet:
    """Five pairs of neighbours along the wall, of 64 x 48 pixels."""
    frames = [camera.frame(f"{i}.png") for i, camera in enumerate(walk(6))]
    return PairSet("wall", [Pair(f"{i}-{i + 1}", "wall", frames[i], frames[i + 1]) for i in range(5)], 64)


class ByColour(nn.Module):
    """Features that are waves of a patch's mean red and green: patches of one place on the wall have like features.

    Before the norm, CLS and four registers come first, as in DINOv2 with registers.
    """

    patch_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.waves = nn.Parameter(torch.linspace(-8, 8, 16))

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        p = self.patch_size
        colours = images[:, :2].unfold(2, p, p).unfold(3, p, p).mean((-2, -1)).flatten(2).mT
        phases = colours[..., None] * self.waves
        patches = torch.cat([phases.sin(), phases.cos()], -1).flatten(2)
        others = torch.full_like(patches[:, :5], 7.0)
        return {"x_norm_patchtokens": patches, "x_prenorm": torch.cat([others, patches], 1)}


@pytest.fixture
def by_colour() -> ByColour:
    return ByColour()


@pytest.fixture
def wall_file(tmp_path: Path) -> Path:
    """The same wall as a pairs.jsonl with pictures and depth in millimetres, A's at twice the size: 8 pairs."""
    folder, shots = tmp_path / "wall", walk(16)
    for i, camera in enumerate(shots):
        depth = (camera if i % 2 else Shot(np.diag([2, 2, 1]) @ camera.K, camera.T, (128, 96))).depth()
        camera.save(folder / f"{i}.png", folder / f"{i}_depth.png", 1000 * depth)
    lines = []
    for i in range(0, 16, 2):
        a, b = shots[i], shots[i + 1]
        record = {"id": f"pair {i}", "image_a": f"{i}.png", "image_b": f"{i + 1}.png"}
        record |= {"depth_a": f"{i}_depth.png", "depth_b": f"{i + 1}_depth.png"}
        record |= {"K_a": a.K.tolist(), "K_b": b.K.tolist(), "T_b_a": relative_pose(a.T, b.T).tolist()}
        lines.append(json.dumps(record))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"
