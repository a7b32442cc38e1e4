"""Pretrain MuM: `python -m fastmum.train --config configs/quickstart.yaml [key.sub=value ...]`."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fastmum.config import Config, ConfigError, describe_keys, load_config
from fastmum.data.decode import make_decoder
from fastmum.data.errors import DataError
from fastmum.data.loader import Loader
from fastmum.data.splits import DataSplits, open_splits
from fastmum.engine.bad_steps import BadSteps, TrainingError
from fastmum.engine.checkpoint import CheckpointError, Checkpoints, set_aside_after
from fastmum.engine.compile import compile_model
from fastmum.engine.consensus import StopConsensus
from fastmum.engine.cost import Cost, paper_line
from fastmum.engine.device import pick_device, pick_precision
from fastmum.engine.distributed import DistContext, DistributedError, init_distributed, read_launch_env
from fastmum.engine.evaluation import Evaluation
from fastmum.engine.gradients import Gradients
from fastmum.engine.guard import NonFiniteGuard
from fastmum.engine.heartbeat import Heartbeat, is_of_processes
from fastmum.engine.memory import keep_freed_memory
from fastmum.engine.meter import Meter
from fastmum.engine.model import REDUCE, build_model, matrix_dtype
from fastmum.engine.optimizer import build_optimizer
from fastmum.engine.prefetcher import Prefetcher
from fastmum.engine.profile import StepProfiler
from fastmum.engine.readout import Readout
from fastmum.engine.resume import ResumeState, about_checkpoint, resume
from fastmum.engine.rundir import RunDir
from fastmum.engine.schedule import learning_rate
from fastmum.engine.step import Step
from fastmum.engine.stop import StopRequest, exit_code
from fastmum.engine.telemetry import Telemetry
from fastmum.model.mum import MuM

log = logging.getLogger("fastmum")

SHOWN = ("loss", "held_out_loss", "frames_per_s")  # beside the progress bar


class PeerError(RuntimeError):
    """Another process has died; the message is one line for the user, and says which."""


def train(config: Config) -> int:
    """Do the whole of a run, or what is left of it; every process of the run calls it.

    Returns:
        0, or the exit code of the signal that stopped the run after it saved (`fastmum.engine.stop`).

    Raises:
        ConfigError, DataError, DistributedError, CheckpointError, TrainingError, PeerError: as their one line says.
    """
    place = read_launch_env()
    world = init_distributed(place, pick_device(config.train.device, place))
    precision = pick_precision(config.train.precision, world.device)
    config = replace(config, train=replace(config.train, precision=precision))
    with Heartbeat(world, config.parallel.dead_after_s) as watch:
        try:
            code = _train(config, world)
            world.wait()
        except RuntimeError as error:
            dead = watch.culprit() if is_of_processes(error) else None
            if dead is None:
                raise
            raise PeerError(f"{dead}; the run goes on from its last checkpoint") from error
    world.close()
    return code


def _train(config: Config, world: DistContext) -> int:
    torch.manual_seed(config.run.seed)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)

    run, steps = RunDir(Path(config.run.dir).expanduser()), config.train.steps
    model = build_model(config, world)
    optimizer = build_optimizer(model, config.optim, matrix_dtype(config, world))
    start = resume(config, run, world, optimizer)
    if start.step >= steps:
        log.info(
            "nothing to do: the run in '%s' has done its %d steps; another run.dir starts anew", run.root, start.step
        )
        return 0

    _compile(config, model, world, steps - start.step)
    sources = _open_sources(config, run, world, start)
    decoder = make_decoder(config.data.decoder, config.data.image_size, world.device, int(config.data.cache_gb * 1e9))
    loader = Loader(decoder, sources.manifests, config.data.workers, run.bad_frames, sources.is_held_out)
    feed = Prefetcher(loader, sources.training, world, config)
    evaluation = Evaluation(sources, loader, config, world)
    gradients = Gradients(model.parameters(), world, feed.batches_per_step, REDUCE[config.parallel.reduce])
    guard, meter = NonFiniteGuard(world.device), Meter(world, loader)
    if start.state:
        guard.load(start.state)
        meter.load(start.state)
    step = Step(model, optimizer, gradients, guard, meter, world, config)
    cost = Cost(
        config.model_config, config.data.image_size, config.model.mask_ratio, world.device, config.train.precision,
        steps, start.step, world.size, start.device_seconds,
    )  # fmt: skip
    checkpoints = Checkpoints(
        run.checkpoints, config.train.keep_checkpoints, config.train.keep_every, config.train.checkpoint_async,
        world.background,
    )  # fmt: skip
    checkpoints.prepare(optimizer.state() | guard.state() | meter.state())
    readout = Readout(step, guard, meter, cost, loader, checkpoints, BadSteps(config, run, world, feed, checkpoints))
    telemetry = Telemetry(run, start.step, config) if world.is_main else None
    profiler = StepProfiler(config.profile.window, run.root / "profile", world.device, start.step, world.rank)
    progress = tqdm(
        initial=start.step,
        total=steps,
        unit="step",
        desc=config.run.name,
        dynamic_ncols=True,
        disable=not world.is_main,
    )
    agreement, batches = StopConsensus(world), feed.batches(start.step, steps)
    log.info("%d frames a step; %s", start.frames_per_step, paper_line())

    with (
        StopRequest() as stop, progress, logging_redirect_tqdm(), contextlib.closing(batches), _closing(telemetry),
        profiler, _collector_off(),
    ):  # fmt: skip
        for done in range(start.step + 1, steps + 1):
            for part in range(1, feed.batches_per_step + 1):
                batch = next(batches)
                step.accumulate(batch, last=part == feed.batches_per_step)
                cost.add(batch.lengths)
            checkpoints.before_update()
            rate = learning_rate(done - 1, steps, config.optim, start.frames_per_step)
            step.update(done, rate)
            stopped = agreement.largest(stop.signal or 0)
            with meter.paused():
                profiler.step(done)

            evaluates = evaluation.has_held_out and _due(done, config.train.eval_every, steps)
            if evaluates or _due(done, config.train.log_every, steps):
                values = readout.values(done, rate)
                if evaluates:
                    with meter.paused():
                        values["held_out_loss"] = evaluation.held_out_loss(model)
                if telemetry:
                    telemetry.log(done, values)
                progress.set_postfix({k: f"{values[k]:.3g}" for k in SHOWN if values.get(k) is not None}, refresh=False)
            if _due(done, config.train.picture_every, steps):
                with meter.paused():
                    picture = evaluation.picture(model)
                    if telemetry:
                        telemetry.picture(done, picture)
            if stopped or _due(done, config.train.checkpoint_every, steps):
                with meter.paused():
                    state = optimizer.state() | guard.state() | meter.state()
                    checkpoints.save(done, state, about_checkpoint(config, world, start.frames_per_step, cost.state()))
            if done % config.train.collect_every == 0:
                gc.collect()
            progress.update()
            if stopped:
                checkpoints.close()
                log.warning(
                    "%s: saved at step %d; train.resume=auto goes on from there", signal.Signals(stopped).name, done
                )
                return exit_code(stopped)
        agreement.finish()
        checkpoints.close()
    log.info("done: %s", _summary(run, values))
    return 0


def _compile(config: Config, model: MuM, world: DistContext, steps: int) -> None:
    """Compile the model, and make the most of the device.

    Raises:
        ConfigError: `train.cuda_graphs` cannot be used.
    """
    try:
        compile_model(
            model, config.model.compile, steps, several_devices=world.size > 1, cuda_graphs=config.train.cuda_graphs
        )
    except ValueError as error:
        raise ConfigError(f"train.cuda_graphs is true, but {error}") from None
    if world.device.type == "cpu":
        keep_freed_memory()


def _open_sources(config: Config, run: RunDir, world: DistContext, start: ResumeState) -> DataSplits:
    """Open what the run draws from, and write its configuration down; the first process makes what is missing.

    Raises:
        ConfigError, DataError: the folder cannot be written, the data cannot be used.
    """
    parts, sources = start.frames_per_step // config.data.frames_per_batch, None
    if world.is_main:
        try:
            run.root.mkdir(parents=True, exist_ok=True)
            sources = open_splits(config, run.root, start.step > 0, parts)
            run.config.write_text(config.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run.dir is '{run.root}', but cannot be written ({error.strerror})") from None
        set_aside_after(run.checkpoints, start.step)
    world.wait()
    return sources or open_splits(config, run.root, True, parts)


@contextlib.contextmanager
def _closing(telemetry: Telemetry | None) -> Iterator[None]:
    try:
        yield
    finally:
        if telemetry:
            telemetry.close()


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Python's garbage collector runs at fixed steps, on all processes at once, and passes over what lives on."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _due(done: int, every: int, steps: int) -> bool:
    return done % every == 0 or done == steps


def _summary(run: RunDir, values: dict[str, float]) -> str:
    held_out = f", held-out loss {values['held_out_loss']:.3f}" if "held_out_loss" in values else ""
    loss = "none" if values["loss"] is None else f"{values['loss']:.3f}"
    return f"loss {loss}{held_out} (the patch mean alone scores 1.0); picture: {run.newest_picture}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    keys = "\n".join(
        textwrap.fill(
            f"{key.name} ({key.kind}, {key.default}): {key.meaning}",
            110,
            initial_indent="  ",
            subsequent_indent="      ",
        )
        for key in describe_keys()
    )
    parser = argparse.ArgumentParser(
        prog="python -m fastmum.train",
        description="Pretrain a MuM encoder and decoder. A run that was stopped goes on with the same command.",
        epilog=f"keys (type, default):\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, or the name of an installed one: quickstart")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys to set, after the file's")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parse(argv)
    _log_to_stderr()
    try:
        config = load_config(args.config, args.overrides)
        if args.print_config:
            print(config.to_yaml(), end="")
            return 0
        return train(config)
    except KeyboardInterrupt:
        print("interrupted; a run goes on from its last checkpoint", file=sys.stderr)
        return 130
    except (ConfigError, DataError, DistributedError, CheckpointError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # threads may wait for the dead process for as long as their timeouts say


def _log_to_stderr() -> None:
    """One process tells what happens; the others only what is wrong, and who they are."""
    try:
        rank = read_launch_env().rank
    except DistributedError:
        rank = 0  # train will say it
    if rank == 0:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    else:
        logging.basicConfig(level=logging.WARNING, format=f"[rank {rank}] %(message)s")


if __name__ == "__main__":
    sys.exit(main())
