"""Training step of relative pose: Reloc3r's code in plain PyTorch and fastmum, timed in turn by phases.

`python -m benchmarks.pose --pairs 8 --rounds 5 [key.sub=value ...]`, with settings of fastmum. Weights, frames and
poses are the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import NamedTuple

import torch

from benchmarks.contestant import Contestant, Lap, RemoteContestant
from benchmarks.reconstruction import fastmum_step
from benchmarks.reference.model import ReferenceMuM
from benchmarks.reference.pose import ReferenceReloc3r, pose_loss
from benchmarks.results import FASTMUM, REFERENCE
from benchmarks.step import AGREEMENT, Comparison
from fastmum.config import ConfigError, load_config
from fastmum.data.scene_loader import SceneBatch
from fastmum.engine.device import autocast, pick_device, pick_precision
from fastmum.engine.distributed import DistContext, LaunchInfo
from fastmum.errors import run_command
from fastmum.tasks.pose.config import Config
from fastmum.tasks.pose.convert import to_public
from fastmum.tasks.pose.model import HALF, RelativePose
from fastmum.tasks.pose.task import PoseTask

MID = ["model.encoder=random:mum_vitb16", "model.depth=4", "data.image_size=256"]  # widths of base models, few blocks
LEAST_DIMS = 2  # of weights that decay


class Problem(NamedTuple):
    """The same for both."""

    task: PoseTask
    model: RelativePose
    batch: SceneBatch


class PoseComparison(Comparison):
    """Both with the same weights, frames and poses, in separate processes on a CPU.

    AdamW's first step is the sign of the gradient, and the loss of a few pairs depends on rounding: 2e-3 were seen.
    """

    agreement = AGREEMENT | {"bf16": 5e-3}

    def __init__(self, pairs: int, settings: Sequence[str] = ()) -> None:
        if pairs < 1:
            raise ConfigError(f"--pairs is {pairs}, but must be at least 1")
        self.config = configure(pairs, settings)  # type: ignore[assignment]
        remote = pick_device(self.config.train.device, LaunchInfo()).type == "cpu"
        args = pairs, tuple(settings)
        builders = {REFERENCE: build_reference, FASTMUM: build_fastmum}
        self.contestants = {name: RemoteContestant(b, *args) if remote else b(*args) for name, b in builders.items()}


def configure(pairs: int, settings: Sequence[str]) -> Config:
    """The settings of fastmum."""
    config = load_config(None, [f"data.pairs_per_batch={pairs}", *settings], Config)
    config.train.precision = pick_precision(config.train.precision, pick_device(config.train.device, LaunchInfo()))
    return config


def make_problem(pairs: int, settings: Sequence[str]) -> Problem:
    """Equal arguments give equal problems: noise seen by random cameras."""
    config = configure(pairs, settings)
    device, size, frames = pick_device(config.train.device, LaunchInfo()), config.data.image_size, 2 * pairs
    torch.manual_seed(config.run.seed)
    task = PoseTask(config, DistContext(device=device))
    model = task.build()
    pose = torch.eye(4).repeat(frames, 1, 1)
    pose[:, :3, :3] = torch.linalg.matrix_exp(0.5 * (A := torch.randn(frames, 3, 3)) - 0.5 * A.mT)
    pose[:, :3, 3] = torch.randn(frames, 3)
    pixels = torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8)
    depth, K = torch.zeros(frames, size, size), torch.eye(3).repeat(frames, 1, 1)
    batch = SceneBatch(*(x.to(device) for x in (pixels, depth, depth > 0, K, pose)), (2,) * pairs, ("scene",) * pairs)
    return Problem(task, model, batch)


def build_reference(pairs: int, settings: Sequence[str]) -> Contestant:
    """A step in plain PyTorch: encoder, decoder and loss, AdamW with two learning rates and no clipping."""
    task, ours, batch = make_problem(pairs, settings)
    config, device, sizes = task.config, batch.images.device, ours.config
    about = {name: value for name, value in asdict(sizes).items() if name != "patch_size"}
    model = ReferenceReloc3r(**about).to(device)
    model.load_state_dict(to_public(ours.state_dict(), sizes))
    assert ours.encoder is not None
    encoder = ReferenceMuM(**vars(ours.encoder.config)).to(device)
    encoder.load_state_dict(ours.encoder.state_dict(), strict=False)  # without a decoder
    own = {name for name, _ in ours.encoder.named_parameters()}
    optim, rate = config.optim, config.optim.base_lr
    groups = []
    for named, scale in (
        ([(n, p) for n, p in encoder.named_parameters() if n in own], config.model.encoder_lr_scale),
        ([*model.named_parameters()], 1.0),
    ):
        for decays in (True, False):
            some = [p for _, p in named if (p.ndim >= LEAST_DIMS) == decays]
            groups.append({"params": some, "lr": scale * rate, "weight_decay": optim.weight_decay * decays})
    optimizer = torch.optim.AdamW(groups, rate, tuple(optim.betas))  # type: ignore[arg-type]
    # The public loader normalises the images, and holds the views apart.
    images = (batch.images.permute(0, 3, 1, 2) / 255 - HALF[0]) / HALF[0]
    views = torch.cat([images[0::2], images[1::2]])
    world = torch.linalg.inv(batch.camera_from_world)
    side, precision = config.data.image_size // sizes.patch_size, config.train.precision
    del ours

    def step(lap: Lap) -> float:
        with autocast(device, precision):
            poses = model(encoder.forward_features(views)["x_norm_patchtokens"], (side, side))
        loss = pose_loss(poses, (world[0::2], world[1::2]))
        lap("forward")
        loss.backward()
        lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")
        return loss.item()

    return Contestant(REFERENCE, step, device)


def build_fastmum(pairs: int, settings: Sequence[str]) -> Contestant:
    """A step as in `fastmum.engine.step`."""
    return fastmum_step(*make_problem(pairs, settings))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pose", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step (8)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, after two to warm up (5)")
    meaning = "a setting, as in training; default: an encoder and a decoder of width 768, of 12 and 4 blocks"
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help=meaning)
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, but must be at least 1")

    def command() -> None:
        with closing(PoseComparison(args.pairs, [*MID, *args.settings])) as comparison:
            comparison.report(args.rounds)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
