"""A run is the same on any number of processes, by every strategy and mode, also if these change at a resume."""

import pytest
import torch
from runs import SMALL

from fastmum.data.plan import MODES
from fastmum.engine.checkpoint import set_aside_after
from fastmum.model.compile import has_cpp_compiler

# A step has 24 frames in four micro-batches.
ARGS = [
    *SMALL, "data.frames_per_step=24", "train.steps=20", "train.checkpoint_every=10", "train.eval_every=10",
    "train.eval_batches=3", "train.picture_every=20", "train.precision=fp32",
]  # fmt: skip
STRATEGIES = {
    "ddp": [],
    "fsdp2": ["parallel.strategy=fsdp2"],
    "hsdp": ["parallel.strategy=hsdp", "parallel.shard=2"],
}
BF16 = ["train.precision=bf16", "parallel.reduce=bf16", "model.recompute=blocks"]
MUON = ["optim.optimizer=muon", "optim.muon_lr_scale=2"]
UNEVEN = [*MUON, "data.frames_per_batch=8"]  # 3 micro-batches; of 32 rows 3 processes hold 11, 11 and 10
COMPILED = ["train.steps=5", "train.eval_every=5", "model.compile=full"]  # several processes: a graph per block
QUICK = [
    (2, "ddp", ["data.mode=paper"]), (4, "ddp", ["data.mode=packed"]), (2, "fsdp2", ["data.mode=packed"]),
    (4, "hsdp", ["data.mode=balanced"]), (2, "fsdp2", BF16),
    (4, "ddp", MUON), (3, "fsdp2", UNEVEN), (2, "fsdp2", [*BF16, *MUON]),
]  # fmt: skip
ALL = [(size, strategy, [f"data.mode={mode}"]) for size in (2, 4) for strategy in STRATEGIES for mode in MODES]
if has_cpp_compiler():  # Inductor on the CPU
    ALL += [(4, strategy, COMPILED) for strategy in STRATEGIES]
ALL += [(2, "ddp", MUON), (2, "fsdp2", MUON), (4, "fsdp2", MUON)]


def assert_same(ours, theirs, atol=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e3 * atol)
        torch.testing.assert_close(a, {**b, "grad_norm": a["grad_norm"]}, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("size", "strategy", "more"),
    [
        *QUICK,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "ddp", BF16), (4, "hsdp", MUON))),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ALL if case not in QUICK),
    ],
)
def test_as_one_process_with_the_same_global_batch(run, size, strategy, more):
    single, several = run("single", 1, *more), run("several", size, *more, *STRATEGIES[strategy])
    assert len(several) == (5 if more is COMPILED else 20)
    assert several[-1]["held_out_loss"] < several[0]["loss"]
    assert_same(several, single, atol=2e-3 if BF16[0] in more else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_another_number_of_processes_at_every_resume(run, tmp_path, optimizer):
    """Step, rate, frames of a step and data continue; a checkpoint of any strategy is read by any other."""
    often = ("train.checkpoint_every=5", "train.keep_checkpoints=9", f"optim.optimizer={optimizer}")
    whole = run("whole", 1, *often)
    run("resumed", 2, *often, *STRATEGIES["fsdp2"])
    for size, step, strategy in ((4, 5, "ddp"), (2, 10, "fsdp2"), (4, 10, "hsdp"), (1, 15, "ddp")):
        set_aside_after(tmp_path / "resumed/checkpoints", step)
        assert_same(run("resumed", size, *often, "data.frames_per_step=null", *STRATEGIES[strategy]), whole)
