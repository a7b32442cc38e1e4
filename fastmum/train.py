"""Train: `python -m fastmum.train --config configs/quickstart.yaml [key.sub=value ...]`."""

if __name__ == "__main__":  # before the imports that take seconds
    from fastmum.engine.stop import exit_on_signals

    exit_on_signals()

import argparse
import contextlib
import gc
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from fastmum.config.load import describe_keys, load_config, peek_task, settings
from fastmum.config.schema import ConfigError, EngineConfig, absolute_paths
from fastmum.engine.checkpoint import CheckpointError, Checkpoints, set_aside_after
from fastmum.engine.device import (
    MATRIX_DTYPE,
    Prefetcher,
    autocast,
    keep_freed_memory,
    make_deterministic,
    pick_device,
    pick_precision,
)
from fastmum.engine.distributed import DistributedError, broadcast_weights, init_distributed, read_launch_env, shard
from fastmum.engine.ending import VOID, Tally, drop_after, first_error
from fastmum.engine.gradients import Gradients
from fastmum.engine.heartbeat import Heartbeat, PeerError
from fastmum.engine.meter import Efficiency, Meter, paper_line
from fastmum.engine.optimizer import Ema, build_optimizer, learning_rate
from fastmum.engine.resume import checkpoint_values, note_start, resume, warn_of_changes
from fastmum.engine.rundir import RunDir
from fastmum.engine.step import NonFiniteGuard, Step, check_bad_steps
from fastmum.engine.stop import StopConsensus, StopRequest, exit_code
from fastmum.engine.task import Task
from fastmum.engine.telemetry import Telemetry, log_line
from fastmum.errors import first_line, program, run_command
from fastmum.files import source_version
from fastmum.pretrained.load import absolute_spec
from fastmum.progress import on_terminal, progress_bar
from fastmum.tasks import find_task

log = logging.getLogger("fastmum")

SHOWN = ("loss", "held_out_loss", "frames_per_s")  # next to the progress bar


def train(config: EngineConfig, task: type[Task] | None = None) -> int:
    """Train a run, or continue it. Every process of the run calls this.

    `config` is an instance of the task's `Config`; `task` its class, None for the one that `run.task` names. Returns 0,
    or the exit code of the signal that stopped the run after it saved (`fastmum.engine.stop`). FastmumError:
    ConfigError, DataError, DistributedError, CheckpointError, TrainingError or PeerError.
    """
    launch, parallel = read_launch_env(), config.parallel
    # Collective operations wait longer, so that the heartbeat can name a stuck process first.
    timeout = timedelta(seconds=2 * parallel.stuck_after_s)
    world = init_distributed(launch, pick_device(config.train.device, launch), timeout)
    precision = pick_precision(config.train.precision, world.device)
    config = absolute_paths(replace(config, train=replace(config.train, precision=precision)), absolute_spec)
    run = RunDir(Path(config.run.dir))
    beats = Heartbeat(world, parallel.dead_after_s, parallel.stuck_after_s) if world.size > 1 else None
    with beats or contextlib.nullcontext():
        if world.size > 1:  # the digest of the source reads all of its files
            versions = {"Python": sys.version.split()[0], "torch": torch.__version__, "fastmum": source_version()}
            world.check_same("versions", versions)
            world.check_same("settings", settings(config))
        with run.held(world):
            code = _train(config, run, (task or find_task(config.run.task))(config, world))
            world.wait()
    world.close()
    return code


def _train(config: EngineConfig, run: RunDir, task: Task) -> int:
    torch.manual_seed(config.run.seed)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    world, steps, precision = task.world, config.train.steps, config.train.precision
    if config.train.deterministic:
        make_deterministic(world.device)

    model = task.build()
    broadcast_weights(model, world)
    dtype, reduce_dtype = MATRIX_DTYPE[precision], MATRIX_DTYPE[config.parallel.reduce]
    blocks, parallel = task.blocks(model), config.parallel
    exact = task.exact(model)
    if shard(model, blocks, world, parallel.strategy, parallel.shard, dtype, reduce_dtype, exact):
        dtype = torch.float32  # FSDP casts the weights that it gathers
    groups = task.groups(model)
    matrices, products = task.matrices(model), MATRIX_DTYPE[precision]
    optimizer = build_optimizer(model, config.optim, dtype, groups, matrices, world, products, exact)
    ema = Ema(optimizer.weights, config.train.ema) if config.train.ema is not None else None
    guard, meter = NonFiniteGuard(world.device), Meter(task.metrics, world)
    buffers = {f"model.{name}": buffer for name, buffer in task.buffers(model).items()}

    def state() -> dict[str, Any]:
        return optimizer.state() | buffers | (ema.state() if ema else {}) | guard.state() | meter.state()

    start = resume(config, run, task, loaded := state())
    if start.resumed:
        meter.load(loaded)
    if start.step >= steps:
        log.info("nothing to do: the run in '%s' has done its %d steps; use another run.dir", run.root, start.step)
        return 0

    for note in config.notes() if world.is_main else ():
        log.warning(note)
    task.compile(model, steps - start.step)
    if world.device.type == "cpu":
        keep_freed_memory()
    task.batches_per_step = start.samples_per_step // task.samples.micro_batch // world.size
    _open_data(config, run, task, start.step, start.samples_per_step)
    if world.is_main:
        warn_of_changes(start.data, task.data_digests())
    gradients = Gradients(groups, world, task.batches_per_step, reduce_dtype)
    step = Step(task, model, groups, optimizer, gradients, guard, meter, ema, precision)
    efficiency = Efficiency(task, precision, steps, start.step, start.device_seconds)
    checkpoints = Checkpoints(
        run.checkpoints, config.train.keep_checkpoints, config.train.keep_every, config.train.checkpoint_async,
        world.background,
    )  # fmt: skip
    checkpoints.prepare(state())
    telemetry = None
    if world.is_main:
        telemetry = Telemetry(run, start.step, config.telemetry.wandb, config.run.name, asdict(config))
    profiler = None
    if window := config.profile.window:
        from fastmum.engine.profile import StepProfiler

        profiler = StepProfiler(window, run.profile, world.device, start.step, world.rank)
    unit, show = task.samples.unit, world.is_main and on_terminal()
    progress = progress_bar(initial=start.step, total=steps, unit="step", desc=config.run.name, show=show)
    batches = Prefetcher(task.batches(start.step, steps), world.device)
    consensus, tally = StopConsensus(world), Tally(task)

    def save(done: int) -> None:
        with meter.paused():
            content = checkpoint_values(config, task, start.samples_per_step, efficiency.device_seconds())
            checkpoints.save(done, state(), content, volatile=buffers)

    log.info("%d %s per step; %s", start.samples_per_step, unit, paper_line())
    waited, values = 0.0, {}
    if config.train.eval_first and task.evaluates and start.step == 0:
        with meter.paused(), autocast(world.device, precision):
            first = task.evaluate(model)
        if telemetry:
            telemetry.log(0, first)

    with (
        StopRequest() as stop, progress, logging_redirect_tqdm(), contextlib.closing(batches),
        contextlib.closing(telemetry) if telemetry else contextlib.nullcontext(),
        profiler or contextlib.nullcontext(), _collector_off(), contextlib.closing(task),
    ):  # fmt: skip
        task.stopping = lambda: stop.signal is not None
        batches.start()
        # All processes have a first batch, or none begins.
        done, stopped = start.step, consensus.largest(_flag(stop, batches)) | consensus.finish()
        for done in () if stopped & VOID else range(start.step + 1, steps + 1):
            for part in range(1, task.batches_per_step + 1):
                batch = next(batches)
                world.advance()
                step.accumulate(batch, last=part == task.batches_per_step, void=batches.error is not None)
                efficiency.add(batch)
            checkpoints.before_update()
            rate = learning_rate(done - 1, steps, config.optim, start.samples_per_step)
            step.update(done, rate)
            stop.begin()
            stopped = consensus.largest(_flag(stop, batches))
            if stopped & VOID:
                break
            tally.step()
            if profiler:
                with meter.paused():
                    profiler.step(done)

            evaluates = task.evaluates and _due(done, config.train.eval_every, steps)
            if evaluates or _due(done, config.train.log_every, steps):
                # The only place where training waits for the device.
                means, seconds, samples, numbers = meter.read(guard.counts, *step.norms.values())
                counts, norms = [int(n) for n in numbers[:4]], numbers[4:]
                check_bad_steps(config, run, task, checkpoints, counts)
                values = means | {
                    "lr": rate,
                    **dict(zip(step.norms, norms, strict=True)),
                    "skipped_steps": counts[1],
                    "data_wait": (batches.wait_seconds - waited) / seconds,
                    **efficiency.read(done, seconds, samples),
                    "checkpoint_stall_s": checkpoints.stall_seconds,
                    **task.counters(),
                }
                waited = batches.wait_seconds
                if evaluates:
                    with meter.paused(), autocast(world.device, precision):
                        values |= task.evaluate(model)
                        if ema:
                            with ema.applied():
                                values |= {f"{name}_ema": value for name, value in task.evaluate(model).items()}
                if telemetry:
                    telemetry.log(done, values)
                    if progress.disable:
                        log.info(log_line(done, steps, values, unit, world.size))
                progress.set_postfix({k: f"{values[k]:.3g}" for k in SHOWN if values.get(k) is not None}, refresh=False)
            world.advance()
            if _due(done, config.train.picture_every, steps):
                averaged = ema.applied() if ema else contextlib.nullcontext()
                with meter.paused(), autocast(world.device, precision), averaged:
                    pictures = task.pictures(model, done)
                    if telemetry:
                        telemetry.pictures(done, pictures)
            progress.update()
            if stopped:
                break
            if _due(done, config.train.checkpoint_every, steps):
                save(done)
            if done % config.train.collect_every == 0:
                gc.collect()
        tally.finish()
        latest = consensus.finish()
        error, number = batches.error, max(stopped, latest) & ~VOID
        ended, kept = bool(stopped or latest & VOID), done
        if ended:
            # With several processes `latest` is of this step and `stopped` of the one before.
            kept = max(start.step, done - bool(latest & VOID) - bool(stopped & VOID))
            if kept < done:
                guard.uncount(done - kept)
                drop_after(run.checkpoints, kept, checkpoints, world)
            if kept > start.step:
                save(kept)
        try:
            checkpoints.close()
            if ended and kept:
                cause = signal.Signals(number).name if number else "data error"
                log.warning("%s: saved at step %d; train.resume=auto continues", cause, kept)
        except CheckpointError as failed:
            error = error or failed
        if error := first_error(error, world):
            raise error
        if ended:
            return exit_code(number)
    log.info("done: %s; run folder: %s", task.summary(values), run.root)
    return 0


def _open_data(config: EngineConfig, run: RunDir, task: Task, start: int, samples_per_step: int) -> None:
    """Open the task's data and write the configuration; the first process runs first and creates missing files.

    ConfigError, DataError: the folder cannot be written, or the data cannot be used.
    """
    world = task.world

    def open_data() -> None:
        task.open_data(run.root, start, samples_per_step)

    def open_first() -> None:
        with run.writing():
            open_data()
            continued = replace(config, train=replace(config.train, resume="auto"))  # of whoever trains by this file
            run.write_config(continued.to_yaml(), start)
            note_start(run, config.train.resume, start)
        set_aside_after(run.checkpoints, start)

    world.work(open_first if world.is_main else None)
    world.work(None if world.is_main else open_data)
    world.check_same("data", task.data_digests())
    task.prepare()


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Run Python's garbage collector only at fixed steps, on all processes at once, and exempt existing objects."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _flag(stop: StopRequest, batches: Prefetcher) -> int:
    return (stop.signal or 0) | (VOID if batches.error else 0)


def _due(done: int, every: int, steps: int) -> bool:
    return done % every == 0 or done == steps


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    lines = [f"{key.name} ({key.kind}, {key.default}): {key.meaning}" for key in describe_keys()]  # of MuM
    keys = "\n".join(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="      ") for line in lines)
    parser = argparse.ArgumentParser(
        prog=program("fastmum.train"),
        description="Train a task, by default MuM's pretraining. A stopped run continues with the same command.",
        epilog=f"keys of MuM (type, default):\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, or the name of an installed one: quickstart")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys that override the file")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parse(argv)
    _log_to_stderr()

    def command() -> int:
        task = find_task(peek_task(args.config, args.overrides))
        config = load_config(args.config, args.overrides, task.Config)
        if args.print_config:
            print(config.to_yaml(), end="")
            return 0
        try:
            return train(config, task)
        except PeerError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(error.code)  # threads may wait for the dead process until their timeouts
        except torch.OutOfMemoryError:
            log.debug("the memory of the device is too small", exc_info=True)
            keys = settings(config)
            remedies = [f"lower {key}" for key in keys if key.endswith("_per_batch")]
            remedies += ["set model.recompute=blocks"] * ("model.recompute" in keys)
            raise ConfigError(f"the memory of the device is too small: {' or '.join(remedies)}") from None
        except RuntimeError as error:
            if config.train.deterministic and "deterministic" in str(error):  # of torch, with the operator's name
                raise ConfigError(f"train.deterministic is true, but {first_line(error)}") from None
            raise

    return run_command(command, "interrupted; a run continues from its last checkpoint")


def _log_to_stderr() -> None:
    """INFO on rank 0, warnings with a rank prefix elsewhere."""
    try:
        rank = read_launch_env().rank
    except DistributedError:
        rank = 0  # train reports it
    level, prefix = (logging.WARNING, f"[rank {rank}] ") if rank else (logging.INFO, "")
    logging.basicConfig(level=level, format=f"{prefix}%(message)s")


if __name__ == "__main__":
    sys.exit(main())
