"""Parts of the quickstart: training step, loading, rendering."""

import pytest
import torch

from benchmarks.sizes import Sizes
from fastmum import PRESETS, MuM
from fastmum.config.schema import OptimSection
from fastmum.data.build import build
from fastmum.data.decode import PillowDecoder
from fastmum.data.loader import Loader
from fastmum.data.manifest import Manifests
from fastmum.data.plan import StepPlanner
from fastmum.engine.optimizer import build_optimizer
from fastmum.scenes import ensure_scenes

FRAMES, SIZE, VIEWS = 32, 128, 4


@pytest.fixture(autouse=True)
def _named_after_the_cpu(benchmark):
    """Runs on the CPU of any machine, which a page about a GPU must say."""
    benchmark.fullname += " (on the CPU)"


def test_training_step(benchmark, sizes: Sizes):
    model = MuM(PRESETS["mum_tiny"])
    optimizer = build_optimizer(model, OptimSection(), sizes.dtype)
    frames = torch.randint(0, 256, (FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=sizes.precision == "bf16"):
            loss = model(frames, [VIEWS] * (FRAMES // VIEWS)).loss
        loss.backward()
        optimizer.step(1e-3)
        model.zero_grad()

    benchmark.extra_info["frames"] = FRAMES
    benchmark.pedantic(step, rounds=sizes.rounds, warmup_rounds=2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, quick):
    folder, size = tmp_path_factory.mktemp("scenes"), 64 if quick else 256
    return ensure_scenes(count=2, views=8, size=size, cache_dir=folder, progress=False)


@pytest.mark.parametrize("cache", [0, 10**9], ids=["decoded each time", "decoded once"])
def test_loading(benchmark, scenes, cache, tmp_path):
    build("folder", scenes, tmp_path / "scenes.arrow")
    manifests = Manifests([tmp_path / "scenes.arrow"])
    planner = StepPlanner(manifests, frames_per_gpu=FRAMES, views=(2, 8))
    loader = Loader(PillowDecoder(SIZE, cache), manifests, workers=2)
    plans = [planner.plan(step) for step in range(8)]
    benchmark.extra_info["frames"] = sum(len(plan.rows) for plan in plans)
    benchmark.pedantic(lambda: list(loader.batches(plans)), rounds=5, warmup_rounds=1)


def test_rendering(benchmark, tmp_path_factory, quick):
    views = 2 if quick else 8

    def render():
        ensure_scenes(count=2, views=views, size=256, cache_dir=tmp_path_factory.mktemp("render"), progress=False)

    benchmark.extra_info["frames"] = 2 * views
    benchmark.pedantic(render, rounds=1 if quick else 2)
