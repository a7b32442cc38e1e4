"""A run is the same on any number of processes, by every strategy and mode, also if these change at a resume."""

import itertools

import numpy as np
import pytest
from runs import SMALL, numbers

from fastmum.data.plan import MODES
from fastmum.engine.checkpoint import set_aside_after
from fastmum.model.compile import has_cpp_compiler

# A step has 24 frames in four micro-batches.
WORDS = [
    *SMALL, "data.frames_per_step=24", "train.steps=20", "train.checkpoint_every=10", "train.eval_every=10",
    "train.eval_batches=3", "train.picture_every=20", "train.precision=fp32",
]  # fmt: skip
STRATEGIES = {
    "ddp": [],
    "fsdp2": ["parallel.strategy=fsdp2"],
    "hsdp": ["parallel.strategy=hsdp", "parallel.shard=2"],
}
ALL = list(itertools.product((2, 4), STRATEGIES, MODES))
QUICK = [(2, "ddp", "paper"), (4, "ddp", "packed"), (2, "fsdp2", "packed"), (4, "hsdp", "balanced")]


@pytest.fixture
def run(train_on, tmp_path, image_folder):
    def run(name, size, *more):
        words = [*WORDS, f"data.root={image_folder}", f"run.dir={tmp_path / name}", *more]
        assert train_on(size, words) == [0] * size
        return numbers(tmp_path / name)

    return run


def assert_same(ours, theirs, atol=1e-5):
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for key in ("loss", "held_out_loss", "lr"):
        pairs = [(r[key], other[key]) for r, other in zip(ours, theirs, strict=True) if key in other]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=0, atol=atol, err_msg=key)
    np.testing.assert_allclose(*([r["grad_norm"] for r in runs] for runs in (ours, theirs)), rtol=1e3 * atol)


@pytest.mark.parametrize(
    ("size", "strategy", "mode"), [pytest.param(*e, marks=() if e in QUICK else pytest.mark.exhaustive) for e in ALL]
)
def test_as_one_process_with_the_same_global_batch(run, size, strategy, mode):
    single = run("single", 1, f"data.mode={mode}")
    several = run("several", size, f"data.mode={mode}", *STRATEGIES[strategy])
    assert len(several) == 20
    assert_same(several, single)


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_bfloat16(run, strategy):
    bf16 = ("train.precision=bf16", "parallel.reduce=bf16", "model.recompute=blocks")
    assert_same(run("several", 2, *bf16, *STRATEGIES[strategy]), run("single", 1, *bf16), atol=2e-3)


@pytest.mark.exhaustive
@pytest.mark.skipif(not has_cpp_compiler(), reason="Inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled(run, strategy):
    """One graph on a single process, one per block on several."""
    compiled = ("train.steps=5", "train.eval_every=5", "model.compile=full")
    assert_same(run("several", 4, *compiled, *STRATEGIES[strategy]), run("single", 1, *compiled))


@pytest.mark.slow
def test_another_number_of_processes_at_every_resume(run, tmp_path):
    """Step, rate, frames of a step and data continue; a checkpoint of any strategy is read by any other."""
    often = ("train.checkpoint_every=5", "train.keep_checkpoints=9")
    whole = run("whole", 1, *often)
    run("resumed", 2, *often, *STRATEGIES["fsdp2"])
    for size, step, strategy in ((4, 5, "ddp"), (2, 10, "fsdp2"), (4, 10, "hsdp"), (1, 15, "ddp")):
        set_aside_after(tmp_path / "resumed/checkpoints", step)
        assert_same(run("resumed", size, *often, "data.frames_per_step=null", *STRATEGIES[strategy]), whole)


def test_a_number_of_processes_that_does_not_divide_the_step(train_on, image_folder, tmp_path):
    words = [*WORDS, f"data.root={image_folder}", f"run.dir={tmp_path}/run", "data.frames_per_step=18"]
    for outcome in train_on(2, words):
        assert "2 processes" in outcome
        assert "start 1, 3 processes" in outcome
