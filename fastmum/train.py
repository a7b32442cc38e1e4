"""Pretrain MuM: `python -m fastmum.train --config configs/quickstart.yaml [key.sub=value ...]`."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import math
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.utils import get_total_norm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fastmum.attention import AttentionError, choose_backend
from fastmum.config import Config, ConfigError, describe_keys, load_config
from fastmum.data.decode import make_decoder
from fastmum.data.errors import DataError
from fastmum.data.loader import Loader
from fastmum.data.sources import open_sources
from fastmum.model.mum import MuM
from fastmum.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_newest,
    restore,
    save_checkpoint,
    set_aside_after,
)
from fastmum.training.compile import compile_model
from fastmum.training.evaluation import Evaluation, forward, noise_for
from fastmum.training.memory import keep_freed_memory
from fastmum.training.meter import Meter
from fastmum.training.optim import build_optimizer, learning_rate
from fastmum.training.rundir import RunDir
from fastmum.training.stop import StopRequest
from fastmum.training.telemetry import Telemetry

log = logging.getLogger("fastmum")

PRECISION = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of the matrices that the model computes with
SHOWN = ("loss", "held_out_loss", "frames_per_s")  # beside the progress bar


class TrainingError(RuntimeError):
    """Training that cannot go on; the message is one line for the user."""


def train(config: Config) -> int:
    """Do the whole of a run, or what is left of it.

    Returns:
        0, or the exit code of the signal that stopped the run after it saved.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: as their one line says.
    """
    device = _device(config.train.device)
    torch.manual_seed(config.run.seed)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)

    run, steps = RunDir(Path(config.run.dir).expanduser()), config.train.steps
    model = build_model(config, device)
    optimizer = build_optimizer(model, config.optim, PRECISION[config.train.precision])
    start, meter_state = _resume(config, run, model, optimizer)
    if start >= steps:
        log.info("nothing to do: the run in '%s' has done its %d steps; another run.dir starts anew", run.root, start)
        return 0

    compile_model(model, config.model.compile, steps - start)
    if device.type == "cpu":
        keep_freed_memory()
    with _writing_to(run):
        run.root.mkdir(parents=True, exist_ok=True)
    decoder = make_decoder(config.data.decoder, config.data.image_size, device, int(config.data.cache_gb * 1e9))
    sources = open_sources(config, run.root, resumed=start > 0)
    loader = Loader(decoder, sources.manifests, config.data.workers, run.bad_frames, sources.is_held_out)
    evaluation = Evaluation(sources, loader, config, device)
    with _writing_to(run):
        run.config.write_text(config.to_yaml(), encoding="utf-8")
    set_aside_after(run.checkpoints, start)
    telemetry = Telemetry(run, start)

    plans = (sources.training.plan(step) for step in range(start, steps))
    meter = Meter(device, loader, meter_state)
    progress = tqdm(initial=start, total=steps, unit="step", desc=config.run.name, dynamic_ncols=True)
    with StopRequest() as stop, progress, logging_redirect_tqdm(), contextlib.closing(telemetry), _quiet_collector():
        for done, batch in enumerate(loader.batches(plans), start + 1):
            rate = learning_rate(done - 1, steps, config.optim, config.data.frames_per_batch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            noise = noise_for(config, config.run.seed, done - 1, len(batch.frames))
            loss = forward(model, batch, noise, config, device).loss
            loss.backward()
            evaluates = evaluation.has_held_out and _due(done, config.train.eval_every, steps)
            logs = evaluates or _due(done, config.train.log_every, steps)
            # Nothing is clipped, as in the released configuration: the norm is for the log alone.
            norm = get_total_norm([p.grad for p in model.parameters()]) if logs else None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            meter.add(loss, len(batch.frames))

            if logs:
                values = meter.read() | {"lr": rate, "grad_norm": norm.item(), "bad_frames": loader.faults.total}
                values |= {f"bad_frames/{name}": count for name, count in loader.faults.counts.items()}
                _check_finite(done, values, config)
                if evaluates:
                    with meter.paused():
                        values["held_out_loss"] = evaluation.held_out_loss(model)
                telemetry.log(done, values)
                progress.set_postfix({k: f"{values[k]:.3g}" for k in SHOWN if k in values}, refresh=False)
            if _due(done, config.train.picture_every, steps):
                with meter.paused():
                    telemetry.picture(done, evaluation.picture(model))
            stopped = stop.signal
            if stopped or _due(done, config.train.checkpoint_every, steps):
                with meter.paused():
                    state = meter.state()
                    _check_finite(done, {"loss": state["losses"], "weights": _weight_norm(model)}, config)
                    save_checkpoint(run.checkpoints, done, model, optimizer, state, config.train.keep_checkpoints)
            progress.update()
            if stopped:
                log.warning("%s: saved at step %d; train.resume=auto goes on from there", stopped.name, done)
                return 128 + stopped
    log.info("done: %s", _summary(run, values))
    return 0


def build_model(config: Config, device: torch.device) -> MuM:
    """The model of a run on its device, not yet compiled.

    Raises:
        ConfigError: `model.attention` cannot be used there.
    """
    try:
        backend = choose_backend(config.model.attention, device, PRECISION[config.train.precision])
    except AttentionError as error:
        raise ConfigError(f"model.attention: {error}") from None
    log.info("attention across frames: %s", backend.name)
    model = MuM(config.model_config).to(device)
    model.attention, model.recompute = backend.name, config.model.recompute
    return model


@contextlib.contextmanager
def _writing_to(run: RunDir) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run.dir is '{run.root}', but cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keep Python's garbage collector from looking again and again at what lives as long as the run."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _due(done: int, every: int, steps: int) -> bool:
    return done % every == 0 or done == steps


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"train.device is '{name}', but must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"train.device is '{name}', but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _resume(
    config: Config, run: RunDir, model: MuM, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, float] | None]:
    """Steps done and the meter's state, from the checkpoint that `train.resume` asks for."""
    match config.train.resume:
        case "never":
            run.set_aside()
            content = None
        case "auto":
            content = load_newest(run.checkpoints)
        case path:
            content = load_checkpoint(Path(path).expanduser())
    if content is None:
        return 0, None
    restore(content, model, optimizer)
    log.info("resumed from %s at step %d", content["path"], content["step"])
    return content["step"], content["meter"]


def _weight_norm(model: MuM) -> float:
    """Not finite when any weight is not."""
    return get_total_norm(list(model.parameters())).item()


def _check_finite(done: int, values: dict[str, float], config: Config) -> None:
    """What is not finite must reach neither the log nor a checkpoint."""
    bad = [name for name in ("loss", "grad_norm", "weights") if not math.isfinite(values.get(name, 0.0))]
    if bad:
        raise TrainingError(
            f"{bad[0]} is {values[bad[0]]} at step {done}; a lower optim.base_lr (now {config.optim.base_lr:g}) or "
            "train.precision=fp32 may help, and the run goes on from its last checkpoint"
        )


def _summary(run: RunDir, values: dict[str, float]) -> str:
    held_out = f", held-out loss {values['held_out_loss']:.3f}" if "held_out_loss" in values else ""
    return f"loss {values['loss']:.3f}{held_out} (the patch mean alone scores 1.0); picture: {run.newest_picture}"


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
    parser.add_argument("--config", metavar="FILE", help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys to set, after the file's")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = load_config(args.config, args.overrides)
        if args.print_config:
            print(config.to_yaml(), end="")
            return 0
        return train(config)
    except KeyboardInterrupt:
        print("interrupted; a run goes on from its last checkpoint", file=sys.stderr)
        return 130
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
