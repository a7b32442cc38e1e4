"""Training step of RoMa's decoder: the public code in plain PyTorch and fastmum, timed in turn by phases.

`python -m benchmarks.roma --pairs 2 --rounds 5 [--refiners] [key.sub=value ...]`, with settings of fastmum. Weights,
maps of the encoders and truth are the same. The step has forward pass, losses with their true warps, backward pass,
clipping and AdamW; the encoders are not in it. `--refiners`: local correlation and refiners only, from a given coarse
warp.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.contestant import Contestant, Lap, RemoteContestant
from benchmarks.reference.roma import STRIDES, ReferenceRoMa
from benchmarks.reference.roma import losses_of as reference_losses
from benchmarks.results import FASTMUM, REFERENCE
from benchmarks.step import AGREEMENT, Comparison
from fastmum.config import ConfigError, load_config
from fastmum.engine.device import MATRIX_DTYPE, autocast, keep_freed_memory, pick_device, pick_precision
from fastmum.engine.distributed import DistContext, LaunchInfo
from fastmum.engine.gradients import Gradients
from fastmum.engine.optimizer import build_optimizer
from fastmum.engine.step import NonFiniteGuard
from fastmum.engine.task import ParamGroup
from fastmum.errors import run_command
from fastmum.model.compile import compile_kinds
from fastmum.tasks.roma.config import Config
from fastmum.tasks.roma.decoder import COARSE, Decoder
from fastmum.tasks.roma.losses import losses_of, true_warps
from fastmum.tasks.roma.task import COMPILED

Maps = dict[int, Tensor]


class Problem(NamedTuple):
    """The same for both."""

    config: Config
    device: torch.device
    decoder: Decoder
    maps: tuple[Maps, Maps]  # of the encoders, of two images; those of the fine encoder need gradients
    batch: dict[str, Tensor]  # depths and cameras, by the reference's names
    start: Tensor | None  # (B, 2, h, w) coarse warp, if the coarse matching is not in the step


class RomaComparison(Comparison):
    """Both with the same weights, maps and truth, in separate processes on a CPU.

    In bfloat16 the best anchors of an untrained transformer differ, and with them the refined warps.
    """

    agreement = AGREEMENT | {"bf16": 0.1}

    def __init__(self, pairs: int, refiners: bool, settings: Sequence[str] = ()) -> None:
        self.config = configure(pairs, settings)  # type: ignore[assignment]
        remote = pick_device(self.config.train.device, LaunchInfo()).type == "cpu"
        args = pairs, refiners, tuple(settings)
        builders = {REFERENCE: build_reference, FASTMUM: build_fastmum}
        self.contestants = {name: RemoteContestant(b, *args) if remote else b(*args) for name, b in builders.items()}


def configure(pairs: int, settings: Sequence[str]) -> Config:
    """The settings of fastmum."""
    if pairs < 1:
        raise ConfigError(f"--pairs is {pairs}, but must be at least 1")
    # A small rate: the first steps of AdamW follow signs, which differ in bfloat16 where gradients nearly vanish.
    given = f"data.pairs_per_batch={pairs}", "data.image_size=224", "model.compile=off", "optim.base_lr=1e-6"
    config = load_config(None, [*given, *settings], Config)
    config.train.precision = pick_precision(config.train.precision, pick_device(config.train.device, LaunchInfo()))
    return config


def make_problem(pairs: int, refiners: bool, settings: Sequence[str]) -> Problem:
    """Equal arguments give equal problems: noise as maps, a plane as scene, a fifth of the depth unknown."""
    config = configure(pairs, settings)
    device, side = pick_device(config.train.device, LaunchInfo()), config.data.image_size
    torch.manual_seed(config.run.seed)
    sizes = config.model.sizes(1024, COARSE)
    decoder = sizes.decoder().to(device)
    a, b = (
        {s: torch.randn(pairs, scale.channels, side // s, side // s, device=device).requires_grad_(s != COARSE)
         for s, scale in sizes.scales.items()}
        for _ in range(2)
    )  # fmt: skip
    T = torch.eye(4).repeat(pairs, 1, 1)
    T[:, :3, 3] = 0.2 * torch.randn(pairs, 3)
    K = torch.tensor([[side, 0, side / 2], [0, side, side / 2], [0, 0, 1]]).repeat(pairs, 1, 1)
    depths = [3 * (torch.rand(pairs, side, side) > 0.2).float() for _ in range(2)]
    batch = {"im_A_depth": depths[0], "im_B_depth": depths[1], "T_1to2": T, "K1": K, "K2": K}
    start = None
    if refiners:
        h = side // COARSE
        start = torch.rand(pairs, 2, h, h, device=device) * 2 - 1
    return Problem(config, device, decoder, (a, b), {name: x.to(device) for name, x in batch.items()}, start)


def build_reference(pairs: int, refiners: bool, settings: Sequence[str]) -> Contestant:
    """A step in plain PyTorch."""
    config, device, ours, maps, batch, start = make_problem(pairs, refiners, settings)
    sizes = config.model.sizes(1024, COARSE)
    scales = {s: (x.channels, x.projected, x.displacement, x.radius, x.hidden) for s, x in sizes.scales.items()}
    model = ReferenceRoMa(scales, sizes.gp_dim, sizes.num_heads, sizes.blocks, sizes.anchors, sizes.hidden_blocks)
    model = model.to(device)
    model.load_state_dict(ours.state_dict())
    optim = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), optim.base_lr, tuple(optim.betas), weight_decay=optim.weight_decay
    )  # type: ignore[arg-type]
    del ours

    def step(lap: Lap) -> float:
        with autocast(device, config.train.precision):
            outputs = model(*maps, start)
        loss = reference_losses(outputs, batch)["total"]
        lap("forward")
        loss.backward()
        lap("backward")
        clip_grad_norm_(model.parameters(), optim.clip or torch.inf)
        lap("norm")
        optimizer.step()
        optimizer.zero_grad()
        forget(maps)
        lap("optimizer")
        return loss.item()

    return Contestant(REFERENCE, step, device)


def build_fastmum(pairs: int, refiners: bool, settings: Sequence[str]) -> Contestant:
    """A step as in `fastmum.engine.step`."""
    config, device, decoder, maps, batch, start = make_problem(pairs, refiners, settings)
    precision, optim = config.train.precision, config.optim
    keep_freed_memory()
    names = "im_A_depth", "im_B_depth", "K1", "K2", "T_1to2"
    sizes = [tuple(maps[0][s].shape[2:]) for s in STRIDES]
    if refiners:
        decoder.embedding_decoder.requires_grad_(False)
        decoder.gps.requires_grad_(False)
    trained = [p for p in decoder.parameters() if p.requires_grad]
    groups = [ParamGroup(trained, weight_decay=optim.weight_decay, decay_vectors=True, clip=optim.clip)]
    optimizer = build_optimizer(decoder, optim, MATRIX_DTYPE[precision], groups, exact=decoder.exact())
    compile_kinds(decoder.modules(), COMPILED, config.model.compile, device, config.train.steps)
    gradients, guard = Gradients(groups, DistContext(device=device)), NonFiniteGuard(device)

    def step(lap: Lap) -> float:
        with autocast(device, precision):
            given = None if start is None else (start, start[:, :1] * 0)
            outputs = decoder(*maps, given, strides=STRIDES)
        loss = losses_of(outputs, true_warps(*(batch[name] for name in names), sizes))["objective"]
        lap("forward")
        loss.backward()
        lap("backward")
        norms = gradients.norms()
        found_inf = guard.check(1, loss.detach(), *norms)
        gradients.scale_([None if optim.clip is None else (optim.clip / (norms[0] + 1e-6)).clamp(max=1.0)])
        lap("norm")
        optimizer.step(optim.base_lr, gradients.of, found_inf)
        gradients.clear()
        forget(maps)
        lap("optimizer")
        return loss.item()

    return Contestant(FASTMUM, step, device)


def forget(maps: tuple[Maps, Maps]) -> None:
    """Drop the gradients of the encoders' maps."""
    for side in maps:
        for x in side.values():
            x.grad = None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roma", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2, help="pairs of a step (2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, after two to warm up (5)")
    parser.add_argument("--refiners", action="store_true", help="without the coarse matching")
    parser.add_argument(
        "settings", nargs="*", metavar="key.sub=value", help="a setting, as in training; default: RoMa's sizes, 224 px"
    )  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, but must be at least 1")

    def command() -> None:
        with closing(RomaComparison(args.pairs, args.refiners, args.settings)) as comparison:
            comparison.report(args.rounds)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
