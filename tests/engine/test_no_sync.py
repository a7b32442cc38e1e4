"""Steps between log steps do not wait for the device: no operator whose result the host must see."""

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
ENGINE = Path(fastmum.__file__).parent / "engine"
# What a step goes through, but for functions that belong to the host: plans of attention, checks, log steps.
ON_THE_PATH = {
    "step.py": set(),
    "meter.py": {"read"},
    "optimizer.py": set(),
    "device.py": set(),
    "gradients.py": set(),
}
CALLS = {"item", "cpu", "tolist", "numpy", "nonzero", "synchronize"}


class NoSync(TorchDispatchMode):
    """Notes operators that a host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.seen = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if func.overloadpacket.__name__ in SYNCS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_makes_no_operator_that_waits(image_folder, tmp_path, precision, parts):
    build("folder", image_folder, tmp_path / "a.arrow")
    config = load_config(None, [
        f"data.manifests=[{tmp_path}/a.arrow]", "model.preset=mum_tiny", "data.image_size=32", "data.views=[2,3]",
        "data.frames_per_batch=6", "model.mask_ratio=0.5", f"train.precision={precision}", "optim.clip=0.1",
    ])  # fmt: skip
    task = MuMTask(config, DistContext())
    task.batches_per_step = parts
    task.open_data(tmp_path, 0, 6 * parts)
    model = task.build()
    groups = task.groups(model)
    optimizer = build_optimizer(model, config.optim, MATRIX_DTYPE[precision], groups)
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
    assert mode.seen > 100
    assert not mode.found
    assert optimizer.steps == 2


def test_the_mode_sees_what_waits():
    with NoSync() as mode:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert len(mode.found) >= 2


@pytest.mark.parametrize("file", ON_THE_PATH)
def test_nothing_on_the_path_asks_for_values(file):
    """Tensors on the CPU cannot show a copy from a device: their .cpu() is nothing."""
    tree = ast.parse((ENGINE / file).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert {f.name for f in functions} >= ON_THE_PATH[file]
    for function in functions:
        if function.name not in ON_THE_PATH[file]:
            calls = {
                n.func.attr for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
            }
            assert not calls & CALLS, f"{file}: {function.name}"
