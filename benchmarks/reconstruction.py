"""Training step of reconstruction: VGGT's code in plain PyTorch and fastmum, timed in turn by phases.

`python -m benchmarks.reconstruction --frames 8 --views 4 --rounds 5 [key.sub=value ...]`, with settings of fastmum.
Weights, frames and truth are the same. The truth of the reference is normalised beforehand, fastmum's in every step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.contestant import Contestant, Lap, RemoteContestant
from benchmarks.reference.model import ReferenceMuM
from benchmarks.reference.reconstruction import ReferenceVGGT, losses_of
from benchmarks.reference.step import normalise
from benchmarks.results import FASTMUM, REFERENCE
from benchmarks.step import Comparison
from fastmum.config import ConfigError, load_config
from fastmum.data.scene_loader import SceneBatch
from fastmum.engine.device import MATRIX_DTYPE, autocast, keep_freed_memory, pick_device, pick_precision
from fastmum.engine.distributed import DistContext, LaunchInfo
from fastmum.engine.gradients import Gradients
from fastmum.engine.optimizer import build_optimizer
from fastmum.engine.step import NonFiniteGuard
from fastmum.engine.task import Task
from fastmum.errors import run_command
from fastmum.tasks.reconstruction.camera import encode_cameras
from fastmum.tasks.reconstruction.config import Config
from fastmum.tasks.reconstruction.model import Reconstruction
from fastmum.tasks.reconstruction.task import ReconstructionTask

MID = [  # widths of a base model, few blocks
    "model.encoder=random:mum_vitb16", "model.embed_dim=768", "model.num_heads=12", "model.pairs=2",
    "model.taps=[0,0,1,1]", "model.camera_blocks=1", "data.image_size=224",
]  # fmt: skip


class Problem(NamedTuple):
    """The same for both."""

    task: ReconstructionTask
    model: Reconstruction
    batch: SceneBatch


class SceneComparison(Comparison):
    """Both with the same weights, frames and truth, in separate processes on a CPU; arguments as in `Comparison`."""

    def __init__(self, frames: int, views: int, settings: Sequence[str] = ()) -> None:
        if min(frames, views) < 1 or frames % views:
            raise ConfigError(f"--frames is {frames}, but must be a positive multiple of --views, which is {views}")
        self.config = configure(frames, views, settings)  # type: ignore[assignment]
        remote = pick_device(self.config.train.device, LaunchInfo()).type == "cpu"
        args = frames, views, tuple(settings)
        builders = {REFERENCE: build_reference, FASTMUM: build_fastmum}
        self.contestants = {name: RemoteContestant(b, *args) if remote else b(*args) for name, b in builders.items()}


def configure(frames: int, views: int, settings: Sequence[str]) -> Config:
    """The settings of fastmum."""
    given = f"data.frames_per_batch={frames}", f"data.views=[{views},{views}]", "data.min_frames=1"
    config = load_config(None, [*given, *settings], Config)
    config.train.precision = pick_precision(config.train.precision, pick_device(config.train.device, LaunchInfo()))
    return config


def make_problem(frames: int, views: int, settings: Sequence[str]) -> Problem:
    """Equal arguments give equal problems: noise seen by cameras in a row, with a fifth of the depth unknown."""
    config = configure(frames, views, settings)
    device, size = pick_device(config.train.device, LaunchInfo()), config.data.image_size
    torch.manual_seed(config.run.seed)
    task = ReconstructionTask(config, DistContext(device=device))
    model = task.build()
    pose = torch.eye(4).repeat(frames, 1, 1)
    pose[:, :3, 3] = 0.3 * torch.randn(frames, 3)
    K = torch.tensor([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1]]).repeat(frames, 1, 1)
    valid = torch.rand(frames, size, size) > 0.2
    depth = (1 + 3 * torch.rand(frames, size, size)) * valid
    pixels = torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8)
    lengths = (views,) * (frames // views)
    batch = SceneBatch(*(x.to(device) for x in (pixels, depth, valid, K, pose)), lengths, ("scene",) * len(lengths))
    return Problem(task, model, batch)


def build_reference(frames: int, views: int, settings: Sequence[str]) -> Contestant:
    """A step in plain PyTorch: frozen encoder, loss, norms clipped part by part, AdamW."""
    task, ours, batch = make_problem(frames, views, settings)
    config, device, sizes = task.config, batch.images.device, dict(vars(ours.config))
    if not sizes.pop("points"):
        raise ConfigError("model.points is false, but the public code has a point head")
    model = ReferenceVGGT(**sizes).to(device)
    state = ours.state_dict()
    model.load_state_dict({name: x for name, x in state.items() if not name.startswith("encoder.")})
    assert ours.encoder is not None
    encoder = ReferenceMuM(**vars(ours.encoder.config)).to(device).eval().requires_grad_(False)
    encoder.load_state_dict(ours.encoder.state_dict(), strict=False)  # without a decoder
    scene = task.truth(batch)
    cameras = encode_cameras(scene.camera_from_world, scene.K, (scene.depth.shape[1], scene.depth.shape[2]))
    maps = {"cameras": cameras, "depth": scene.depth, "points": scene.points, "mask": scene.valid}
    truth = {name: x.unflatten(0, (-1, views)) for name, x in maps.items()}
    images = batch.images.permute(0, 3, 1, 2)[None].contiguous()
    side, precision = config.data.image_size // sizes["patch_size"], config.train.precision
    parts: list[nn.Module] = [model.aggregator, model.camera_head, model.depth_head, model.point_head]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), optim.base_lr, tuple(optim.betas), weight_decay=optim.weight_decay
    )  # type: ignore[arg-type]
    del ours, state

    def step(lap: Lap) -> float:
        with autocast(device, precision):
            with torch.no_grad():
                tokens = encoder.forward_features(normalise(images)[0])["x_norm_patchtokens"]
            outputs = model(tokens.unflatten(0, (-1, views)), (side, side))
        loss = losses_of(outputs, truth)["objective"]
        lap("forward")
        loss.backward()
        lap("backward")
        for part in parts:
            clip_grad_norm_(part.parameters(), optim.clip or torch.inf)
        lap("norm")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")
        return loss.item()

    return Contestant(REFERENCE, step, device)


def build_fastmum(frames: int, views: int, settings: Sequence[str]) -> Contestant:
    """A step as in `fastmum.engine.step`."""
    return fastmum_step(*make_problem(frames, views, settings))


def fastmum_step(task: Task, model: nn.Module, batch: SceneBatch) -> Contestant:
    """A step of a task on a batch, which is all of the step, as in `fastmum.engine.step`."""
    config, device, precision = task.config, batch.images.device, task.config.train.precision
    keep_freed_memory()
    groups = task.groups(model)
    exact = task.exact(model)
    optimizer = build_optimizer(model, config.optim, MATRIX_DTYPE[precision], groups, exact=exact)
    task.compile(model, config.train.steps)
    gradients, guard = Gradients(groups, task.world), NonFiniteGuard(device)

    def step(lap: Lap) -> float:
        with autocast(device, precision):
            output = task.loss(model, batch)
        loss = output.loss_sum / output.weight
        lap("forward")
        loss.backward()
        lap("backward")
        norms = gradients.norms()
        found_inf = guard.check(1, loss.detach(), *norms)
        clips = [
            None if g.clip is None else (g.clip / (n + 1e-6)).clamp(max=1.0) for g, n in zip(groups, norms, strict=True)
        ]
        gradients.scale_(clips)
        lap("norm")
        optimizer.step(config.optim.base_lr, gradients.of, found_inf)
        gradients.clear()
        lap("optimizer")
        return loss.item()

    return Contestant(FASTMUM, step, device)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reconstruction", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--frames", type=int, default=8, help="frames of a step (8)")
    parser.add_argument("--views", type=int, default=4, help="frames of a sequence (4)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, after two to warm up (5)")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key.sub=value",
        help="a setting, as in training; default: two pairs of width 768",
    )
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, but must be at least 1")

    def command() -> None:
        with closing(SceneComparison(args.frames, args.views, [*MID, *args.settings])) as comparison:
            comparison.report(args.rounds)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
