"""The update of the weights by AdamW and by Muon, on one device and on several with replicated weights.

Muon's products are divided among devices (`fastmum.engine.muon`): the one with the most work is counted, and the
all-gather of the updates in bfloat16 is added, with nothing hidden. The rest of the step is that of one GPU in
the record: for several, the copies of gradients into float32 sums and their all-reduce are left out.
"""

from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.offline.efficiency import efficiencies
from benchmarks.offline.gpus import Gpu
from benchmarks.offline.kernel import OPTIMISER, Cost
from benchmarks.offline.pricing import Assumptions
from benchmarks.offline.report import BLOCKS, STEP, recorded
from benchmarks.offline.steps import Batch, place, pretending, summed_cost
from fastmum.config.schema import OptimSection
from fastmum.engine.distributed import DistContext
from fastmum.engine.optimizer import build_optimizer
from fastmum.engine.task import matrices_of
from fastmum.model.compile import blocks_of
from fastmum.model.config import PRESETS, ModelConfig
from fastmum.model.mum import MuM

DEVICES = (1, 8, 64)
# Bytes a second that a device receives in an all-gather, of which a share is reached ("links"): within a machine
# NVLink's bandwidth in one direction (data sheets), across machines of 8 devices a network card for each (200, 400 and
# 400 Gbit/s, as in the DGX systems); what a machine receives is shared by its 8 cards.
NVLINK = {"a100": 300e9, "h100": 450e9, "h200": 450e9}
NETWORK = {"a100": 25e9, "h100": 50e9, "h200": 50e9}


def update_cost(config: ModelConfig, gpu: Gpu, optim: OptimSection, devices: int = 1) -> tuple[Cost, int]:
    """The update of bfloat16 weights with float32 halves, and the bytes of its all-gather.

    Gradients are bfloat16 on one device, and float32 sums (`fastmum.engine.gradients`) on several.
    """
    with pretending(gpu, Batch(1, 1)) as recorder:
        with torch.device("meta"):
            model = MuM(config)
        gather = mock.patch.object(dist, "all_gather_into_tensor", return_value=None)
        with FakeTensorMode(), gather as gathers, recorder:
            place(model)
            world = DistContext(size=devices)
            optimizer = build_optimizer(
                model, optim, torch.bfloat16, matrices=matrices_of(blocks_of(model)), world=world
            )
            for part in getattr(optimizer, "partitions", []):
                part.rank = max(range(devices), key=part.loads.__getitem__)
            dtype = torch.float32 if devices > 1 else None
            gradients = {p: torch.empty_like(p, dtype=dtype) for p in model.parameters()}
            state = recorder.live
            recorder.restart()
            optimizer.step(1e-4, gradients.get, torch.zeros(()))
            moved = sum(call.args[0].nbytes for call in gathers.call_args_list)
        return summed_cost(recorder, state, {}), moved


def gather_seconds(moved: int, name: str, devices: int) -> float:
    """An all-gather of `moved` bytes in all, at the whole bandwidth of the links."""
    within = moved * (devices - 1) / devices / NVLINK[name]
    machines = devices // 8
    return max(within, moved * (machines - 1) / machines / (8 * NETWORK[name])) if machines > 1 else within


def table(config: ModelConfig, gpus: dict[str, Gpu]) -> str:
    """Milliseconds by GPU, optimizer and number of devices: likely, low and high predictions of updates and steps.

    Steps are recorded for one model (`report.STEP`) only.
    """
    is_recorded = config == PRESETS[str(STEP["model"])]
    updates, steps = ([f"{what + ', predicted ms':22}" + "".join(f"{gpu:>24}" for gpu in gpus)]
                      for what in ("update", "step"))  # fmt: skip
    runs = [("adamw", 1, "1 GPU"), ("adamw", 8, "several"), *(("muon", n, f"{n} GPU{'s' * (n > 1)}") for n in DEVICES)]
    others = dict[str, list[float]]()  # the rest of a step, in seconds
    for name, gpu in gpus.items():
        rest = recorded(gpu.arch)[BLOCKS].kernels if is_recorded else {}
        kernels = {kernel: n for kernel, n in rest.items() if kernel.kind != OPTIMISER}
        others[name] = [*Assumptions(gpu, efficiencies(name)).device(kernels)]
    for optimizer, devices, label in runs:
        cells = []
        for name, gpu in gpus.items():
            cost, moved = update_cost(config, gpu, OptimSection(optimizer=optimizer), devices)
            shares = efficiencies(name)
            slow, likely, fast, _ = shares["links"]
            device, gather = Assumptions(gpu, shares).device(cost.kernels), gather_seconds(moved, name, devices)
            update = [s + gather / share for s, share in zip(device, (fast, likely, slow), strict=True)]
            cells.append([_range(update), _range([a + b for a, b in zip(update, others[name], strict=True)])])
        for lines, row in zip((updates, steps), zip(*cells, strict=True), strict=True):
            lines.append(f"{optimizer + ', ' + label:22}" + "".join(f"{cell:>24}" for cell in row))
    return "\n".join([*updates, *(["", *steps] if is_recorded else [])])


def _range(seconds: list[float]) -> str:
    low, likely, high = (1e3 * each for each in seconds)
    return f"{likely:.1f} ({low:.1f} to {high:.1f})"
