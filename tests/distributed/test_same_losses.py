"""A run is the same on any number of processes, by every strategy, in every mode; also when these change on the way."""

import itertools

import numpy as np
import pytest
from crew import SMALL

from fastmum.data.build import build
from fastmum.data.manifest import Manifests
from fastmum.data.plan import MODES, StepPlanner
from fastmum.engine.checkpoint import set_aside_after
from fastmum.engine.rundir import read_metrics
from fastmum.model.compile import has_cpp_compiler

STRATEGIES = {
    "ddp": [],
    "fsdp2": ["parallel.strategy=fsdp2"],
    "hsdp": ["parallel.strategy=hsdp", "parallel.shard=2"],
}
EVERY = list(itertools.product((2, 4), STRATEGIES, MODES))
QUICK = [(2, "ddp", "paper"), (4, "ddp", "packed"), (2, "fsdp2", "packed"), (4, "hsdp", "balanced")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(crew, folder, image_folder):
    """Train in a named folder on a number of processes, with more words."""

    def run(name, size, *more):
        # Images of every test are the same, so that runs can be compared over tests.
        words = [*SMALL, f"data.root={image_folder}", f"run.dir={folder / name}", *more]
        assert crew.train(size, words) == [0] * size
        return read_metrics(folder / name / "metrics.jsonl")

    return run


def assert_same(ours, theirs, atol=1e-5):
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for key in ("loss", "held_out_loss", "lr"):
        pairs = [(r[key], other[key]) for r, other in zip(ours, theirs, strict=True) if key in other]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=0, atol=atol, err_msg=key)
    np.testing.assert_allclose(*([r["grad_norm"] for r in runs] for runs in (ours, theirs)), rtol=1e3 * atol)


@pytest.mark.parametrize(
    ("size", "strategy", "mode"), [pytest.param(*e, marks=() if e in QUICK else pytest.mark.exhaustive) for e in EVERY]
)
def test_as_one_process_with_the_same_global_batch(run, size, strategy, mode):
    alone = run(f"alone-{size}-{strategy}-{mode}", 1, f"data.mode={mode}")
    together = run(f"{mode}-{size}-{strategy}", size, f"data.mode={mode}", *STRATEGIES[strategy])
    assert len(together) == 20
    assert_same(together, alone)


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_bfloat16(run, strategy):
    bf16 = ("train.precision=bf16", "parallel.reduce=bf16", "model.recompute=blocks")
    alone, together = run(f"bf16-{strategy}", 1, *bf16), run(f"bf16-2-{strategy}", 2, *bf16, *STRATEGIES[strategy])
    assert_same(together, alone, atol=2e-3)


@pytest.mark.exhaustive
@pytest.mark.skipif(not has_cpp_compiler(), reason="Inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled(run, strategy):
    """One graph on a single process, block by block on several."""
    few = ("train.steps=5", "train.eval_every=5")
    alone = run(f"compiled-{strategy}", 1, *few, "model.compile=full")
    together = run(f"compiled-4-{strategy}", 4, *few, "model.compile=full", *STRATEGIES[strategy])
    assert_same(together, alone)


@pytest.mark.slow
def test_another_number_of_processes_at_every_resume(run, folder):
    """Step, rate, frames of a step and data go on; a checkpoint of any strategy is read by any other."""
    often = ("train.checkpoint_every=5", "train.keep_checkpoints=9")
    whole = run("whole", 1, *often)
    assert run("split", 2, *often, *STRATEGIES["fsdp2"])
    for size, step, strategy in ((4, 5, "ddp"), (2, 10, "fsdp2"), (4, 10, "hsdp"), (1, 15, "ddp")):
        set_aside_after(folder / "split/checkpoints", step)
        again = run("split", size, *often, "data.frames_per_step=null", *STRATEGIES[strategy])
        assert_same(again, whole)


def test_a_number_of_processes_that_does_not_divide_the_step(crew, image_folder, tmp_path):
    words = [*SMALL, f"data.root={image_folder}", f"run.dir={tmp_path}/run", "data.frames_per_step=18"]
    outcomes = crew.train(2, words)
    assert all("2 processes cannot split" in outcome for outcome in outcomes), outcomes
    assert all("start 1, 3 processes" in outcome for outcome in outcomes), outcomes


@pytest.mark.parametrize("mode", MODES)
def test_frames_of_a_step_are_those_of_its_parts(image_folder, tmp_path, mode):
    build("folder", image_folder, tmp_path / "a.arrow")
    manifests = Manifests([tmp_path / "a.arrow"])
    planner = StepPlanner(manifests, frames_per_gpu=6, views=(2, 3), mode=mode, world_size=4)
    for step in range(5):
        parts = [planner.plan(step, rank) for rank in range(4)]
        assert planner.step_frames(step) == sum(len(part.rows) for part in parts)
