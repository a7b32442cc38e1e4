"""Steps between log steps do not synchronise with the device."""

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmum
from fastmum.config import load_config
from fastmum.data.build import build
from fastmum.engine.device import MATRIX_DTYPE, Prefetcher
from fastmum.engine.distributed import DistContext
from fastmum.engine.gradients import Gradients
from fastmum.engine.meter import Meter
from fastmum.engine.optimizer import Ema, build_optimizer
from fastmum.engine.step import NonFiniteGuard, Step
from fastmum.tasks.mum import MuMTask

SYNCS = {
    "_local_scalar_dense", "item", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "is_nonzero", "equal",
    "unique", "_unique2", "unique_dim", "unique_consecutive", "allclose", "bincount", "histc",
}  # fmt: skip
# Files of a training step, and their functions that run only at log steps.
STEP_FILES = {
    "step.py": [],
    "meter.py": ["read"],
    "optimizer.py": [],
    "muon.py": [],
    "device.py": [],
    "gradients.py": [],
}
CALLS = {"item", "cpu", "tolist", "numpy", "nonzero", "synchronize"}


class NoSync(TorchDispatchMode):
    """Records operators whose result the host needs."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in SYNCS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("precision", "parts", "name"), [("bf16", 1, "muon"), ("fp32", 2, "adamw")])
def test_a_step_calls_no_synchronising_operator(image_folder, tmp_path, precision, parts, name):
    build("folder", image_folder, tmp_path / "a.arrow")
    config = load_config(None, [
        f"data.manifests=[{tmp_path}/a.arrow]", "model.preset=mum_tiny", "data.image_size=32", "data.views=[2,3]",
        "data.frames_per_batch=6", "model.mask_ratio=0.5", f"train.precision={precision}", "optim.clip=0.1",
        f"optim.optimizer={name}",
    ])  # fmt: skip
    task = MuMTask(config, DistContext())
    task.batches_per_step = parts
    task.open_data(tmp_path, 0, 6 * parts)
    model = task.build()
    groups = task.groups(model)
    optimizer = build_optimizer(model, config.optim, MATRIX_DTYPE[precision], groups, task.matrices(model))
    guard, meter = NonFiniteGuard(torch.device("cpu")), Meter(task.metrics, task.world)
    gradients, ema = Gradients(groups, task.world, parts), Ema(optimizer.weights, 0.9)
    step = Step(task, model, groups, optimizer, gradients, guard, meter, ema, precision)
    batches = Prefetcher(task.batches(0, 2), torch.device("cpu"))
    with NoSync() as mode:
        for done in (1, 2):
            for part in range(parts):
                step.accumulate(next(batches), last=part == parts - 1)
            step.update(done, 1e-3)
    batches.close()
    assert not mode.found
    with mode:  # it records what it should
        assert optimizer.steps.item() == 2
        torch.ones(3).nonzero()
    assert len(mode.found) == 2


@pytest.mark.parametrize("file", STEP_FILES)
def test_the_source_of_a_step_copies_nothing_to_the_host(file):
    """The operators of a CPU run cannot show it: `.cpu()` of a CPU tensor calls none."""
    tree = ast.parse((Path(fastmum.__file__).parent / "engine" / file).read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for name in STEP_FILES[file]:
        del functions[name]
    for name, function in functions.items():
        calls = {n.func.attr for n in ast.walk(function) if isinstance(n, ast.Call) and hasattr(n.func, "attr")}
        assert not calls & CALLS, f"{file}: {name}"
