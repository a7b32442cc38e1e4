"""The training steps: fastmum's, and the reference's, eager and compiled.

All tensors are fake. Attention is a fused kernel as PyTorch calls it on CUDA: the reference's and fastmum's within
frames by `scaled_dot_product_attention`, fastmum's across them by `fastmum::varlen_attention` (backend `flash`). AdamW
of the eager reference is torch's choice on CUDA (foreach); the compiled one's is fused, as its users would have it.

Memory is simulated: Python and autograd free it in eager code, Inductor's planner in a compiled graph. It includes
weights, masters, gradients and moments. The allocator's rounding and workspaces of cuBLAS and Triton are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import get_total_norm

import fastmum.attention.sdpa
import fastmum.kernels.adamw
import fastmum.kernels.matmul
import fastmum.kernels.muon
import fastmum.kernels.norm
import fastmum.kernels.symmetric
from benchmarks.offline.absent_gpu import absent_gpu
from benchmarks.offline.blocks import compile_blocks
from benchmarks.offline.cubins import spilled_kernels
from benchmarks.offline.gpus import Gpu
from benchmarks.offline.inductor import compile_region
from benchmarks.offline.kernel import NORM, OPTIMISER, Cost, grouped
from benchmarks.offline.recorder import Recorder
from benchmarks.reference.model import ReferenceMuM
from benchmarks.reference.step import normalise
from fastmum.attention import BACKENDS, Segments
from fastmum.attention.varlen import Plan
from fastmum.config.schema import OptimSection
from fastmum.engine import optimizer as optimizers
from fastmum.engine.distributed import DistContext
from fastmum.engine.gradients import Gradients
from fastmum.engine.step import NonFiniteGuard
from fastmum.model.config import ModelConfig
from fastmum.model.inputs import check_frames, num_visible
from fastmum.model.mum import GlobalAttention, MuM
from fastmum.progress import progress_bar

MAX_VIEWS = 24  # of the paper's run, for which attention kernels are launched
MASK_RATIO = 0.75


class Batch(NamedTuple):
    """Frames of a step.

    Args:
        frames: F, in sequences of equal length.
        views: S, frames of a sequence; divides F.
        side: pixels of a frame's side.
    """

    frames: int
    views: int
    side: int = 256

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.frames // self.views


def measure(
    config: ModelConfig, batch: Batch, gpu: Gpu, mode: str, recompute: str, sides: Sequence[str]
) -> dict[str, Cost]:
    """What a step of every side launches.

    Args:
        config: sizes of the model.
        batch: frames of a step.
        gpu: that it runs on.
        mode: what fastmum compiles, "full" or "block".
        recompute: as `model.recompute`, "mlp" or "none".
        sides: some of `report.SIDES` and `report.BLOCKS`.
    """
    ways = {
        "fastmum": lambda: fastmum_cost(config, batch, gpu, mode, recompute),
        "fastmum_block": lambda: fastmum_cost(config, batch, gpu, "block", recompute),
        "reference": lambda: reference_cost(config, batch, gpu, compiled=False),
        "reference_compiled": lambda: reference_cost(config, batch, gpu, compiled=True),
    }
    return {side: ways[side]() for side in progress_bar(sides, desc="lowering", unit="side")}


def fastmum_cost(config: ModelConfig, batch: Batch, gpu: Gpu, mode: str, recompute: str = "mlp") -> Cost:
    """fastmum's step, without logging.

    Args:
        config: sizes.
        batch: the frames.
        gpu: that it runs on.
        mode: of `model.compile`, "block" or "full".
        recompute: as `model.recompute`, "none" or "mlp".
    """
    with pretending(gpu, batch) as recorder:
        with torch.device("meta"):
            model = MuM(config)
        model.set_recompute(recompute)
        with FakeTensorMode():
            with recorder:
                place(model)
                optimizer = optimizers.build_optimizer(model, OptimSection(), torch.bfloat16)
                groups = optimizers.default_groups(model, OptimSection())
                gradients, guard = Gradients(groups, DistContext()), NonFiniteGuard(torch.device("cpu"))
                frames = torch.empty(batch.frames, batch.side, batch.side, 3, dtype=torch.uint8)
                pixels = check_frames(frames, config.patch_size, config.in_chans)
                patches = pixels.grid[0] * pixels.grid[1]
                noise = torch.empty(batch.frames, patches)
                recorder.restart()
            visible = num_visible(patches, MASK_RATIO)
            args = (model, pixels, noise, visible, _global_attention(batch, patches, visible), "none")

            def update() -> None:
                with recorder.counted_as(NORM):
                    (norm,) = gradients.norms()
                found_inf = guard.check(1, torch.empty(()), norm)
                with recorder.counted_as(OPTIMISER):
                    optimizer.step(1e-4, gradients.of, found_inf)
                gradients.clear()

            if mode == "full":
                return _compiled_step(MuM._autoencode, args, model, update, recorder)

            def loss() -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return model._autoencode(*args[1:]).loss.sum() / batch.frames

            regions = compile_blocks(loss, recorder)
            with regions.in_place():
                return _eager_step(loss, update, recorder, regions.sources)


def _global_attention(batch: Batch, patches: int, visible: int) -> GlobalAttention:
    lengths, tokens = [batch.views] * batch.sequences, 1 + patches
    plans = (
        Plan(Segments.of_frames(lengths, batch.frames, queries, tokens, max(MAX_VIEWS, batch.views)), "FA2")
        for queries in (tokens, patches - visible)
    )
    return GlobalAttention(*(partial(BACKENDS["flash"].attend, plan=plan) for plan in plans))


def reference_cost(config: ModelConfig, batch: Batch, gpu: Gpu, compiled: bool) -> Cost:
    """The step of `benchmarks.reference`, in eager mode or with its model compiled as one region.

    Args:
        config, batch, gpu: as for `fastmum_cost`.
        compiled: whether `torch.compile(model, fullgraph=True)` was called.
    """
    with pretending(gpu, batch) as recorder:
        with torch.device("meta"):
            model = ReferenceMuM(
                config.embed_dim,
                config.depth,
                config.num_heads,
                config.decoder_embed_dim,
                config.decoder_depth,
                config.decoder_num_heads,
                config.patch_size,
                config.in_chans,
                config.norm_eps,
            )
        with FakeTensorMode():
            with recorder:
                place(model)
                decayed, plain = ([p for p in model.parameters() if (p.ndim >= 2) == many] for many in (True, False))
                groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
                # As `build_optimizer` of the reference on CUDA.
                how = {"fused": True} if compiled else {"foreach": True}
                optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), **how)
                shape = (batch.sequences, batch.views, 3, batch.side, batch.side)
                frames = torch.empty(shape, dtype=torch.uint8)
                noise = torch.empty(batch.frames, (batch.side // config.patch_size) ** 2)
                give_gradients(model)
                optimizer.step()  # makes the moments
                optimizer.zero_grad()
                recorder.restart()

            def update() -> None:
                with recorder.counted_as(NORM):
                    get_total_norm([p.grad for p in model.parameters()], foreach=True)
                with recorder.counted_as(OPTIMISER):
                    optimizer.step()
                optimizer.zero_grad()

            if compiled:
                with recorder:
                    images = normalise(frames)
                return _compiled_step(model, (images, MASK_RATIO, noise), model, update, recorder, check_spills=False)

            def loss() -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return model(normalise(frames), MASK_RATIO, noise).loss

            return _eager_step(loss, update, recorder)


def _compiled_step(
    function: Callable,
    args: tuple,
    model: nn.Module,
    update: Callable[[], None],
    recorder: Recorder,
    check_spills: bool = True,
) -> Cost:
    """A step whose loss is one compiled region; the preparation of its arguments is recorded already.

    `check_spills` compiles its Triton code, which takes most of the time.
    """
    state = recorder.live
    region = compile_region(function, args, recorder)
    with recorder:
        recorder.lived_with(region.forward.peak)
        recorder.record(region.forward.kernels)
        recorder.lived_with(region.backward.peak)
        recorder.record(region.backward.kernels)
        give_gradients(model)
        update()
    return summed_cost(recorder, state, region.sources if check_spills else {})


def _eager_step(
    loss: Callable[[], Tensor], update: Callable[[], None], recorder: Recorder, sources: dict[str, str] | None = None
) -> Cost:
    """A step whose kernels are launched one by one."""
    state = recorder.live
    with recorder:
        loss().backward()
        update()
    return summed_cost(recorder, state, sources or {})


def summed_cost(recorder: Recorder, state: int, sources: dict[str, str]) -> Cost:
    count, spilled = spilled_kernels(sources, recorder.launches, recorder.arch)
    return Cost(grouped(recorder.kernels), recorder.peak, state, count, spilled)


def give_gradients(model: nn.Module) -> None:
    """Gradients as a compiled region returns them; its peak includes their memory."""
    for p in model.parameters():
        p.grad = torch.empty_like(p)


def place(model: nn.Module) -> None:
    """Fake memory for the parameters and buffers of a model on the meta device."""
    for module in model.modules():
        for table, wrap in ((module._parameters, nn.Parameter), (module._buffers, lambda x: x)):
            for name, x in table.items():
                if x is not None:
                    table[name] = wrap(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype))


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`scaled_dot_product_attention` as it dispatches on CUDA."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _on_cuda(q: Tensor) -> bool:
    """`uses_products` on CUDA."""
    return False


def _in_triton(x: Tensor) -> bool:
    """`use_triton` on CUDA."""
    return True


@contextmanager
def pretending(gpu: Gpu, batch: Batch) -> Iterator[Recorder]:
    """Within it device queries are answered as on that GPU."""
    with (
        absent_gpu(gpu),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _flash),
        mock.patch.object(fastmum.attention.sdpa, "uses_products", _on_cuda),
        mock.patch.object(fastmum.kernels.adamw, "use_triton", _in_triton),
        mock.patch.object(fastmum.kernels.muon, "use_triton", _in_triton),
        mock.patch.object(fastmum.kernels.norm, "use_triton", _in_triton),
        mock.patch.object(fastmum.kernels.symmetric, "use_triton", _in_triton),
        mock.patch.object(fastmum.kernels.matmul, "SLOW_BFLOAT16", False),
        mock.patch.dict(optimizers.CHUNK, cpu=optimizers.CHUNK["cuda"]),
    ):
        yield Recorder(gpu.arch, batch.sequences)
