"""The weights of a run for others: `python -m fastmum.export RUN --format released [--out FILE] [--encoder-only]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmum.model.config import ModelConfig
from fastmum.model.encoder import Encoder
from fastmum.model.mum import MuM
from fastmum.training.checkpoint import About, CheckpointError, read_weights


class ExportError(RuntimeError):
    """An export that cannot be done; the message is one line for the user."""


class Format(NamedTuple):
    """A way to write weights.

    Args:
        suffix: of files.
        meaning: for the help.
        write: given the file, the weights, whether they are the encoder's alone, and the checkpoint.
    """

    suffix: str
    meaning: str
    write: Callable[[Path, dict[str, Tensor], bool, About], None]


def released_state(weights: Mapping[str, Tensor], encoder_only: bool) -> dict[str, Tensor]:
    """Weights with the dtypes of the released files: float32, but the encoder by itself has its periods in bfloat16."""
    periods = torch.bfloat16 if encoder_only else torch.float32
    return {
        name: tensor.to(periods if name == "rope_embed.periods" else torch.float32) for name, tensor in weights.items()
    }


def _write_released(file: Path, weights: dict[str, Tensor], encoder_only: bool, about: About) -> None:
    torch.save(released_state(weights, encoder_only), file)


def _write_safetensors(file: Path, weights: dict[str, Tensor], encoder_only: bool, about: About) -> None:
    metadata = {"model_config": json.dumps(about.model_config), "step": str(about.step)}
    save_file(weights, file, {"format": "pt", **metadata})


FORMATS = {
    "released": Format(".pth", "a state dict by torch.save, as the released checkpoints", _write_released),
    "safetensors": Format(
        ".safetensors", "float32, the model's sizes as JSON in the metadata key model_config", _write_safetensors
    ),
}


class Exported(NamedTuple):
    """What was written.

    Args:
        file: where.
        tensors: how many.
        parameters: how many numbers a training run learns in them.
        about: the checkpoint that they are from.
    """

    file: Path
    tensors: int
    parameters: int
    about: About


def export(
    run: Path, name: str = "released", out: Path | None = None, encoder_only: bool = False, force: bool = False
) -> Exported:
    """Write the weights of the newest checkpoint that is whole.

    Args:
        run: a run, a folder of checkpoints, or a checkpoint.
        name: of the format.
        out: file to write; None: in the run's folder, named after the step.
        force: replace a file that is there.

    Raises:
        CheckpointError: no checkpoint can be read.
        ExportError: it holds no MuM, or the file cannot be written.
    """
    kind = FORMATS[name]
    _check_free(out, force)
    about, tensors = read_weights(run)
    model = _empty_model(about, encoder_only)
    weights = _select(about, tensors, model)
    out = out or _run_folder(about.path) / f"mum_{about.step:07d}{'_encoder' if encoder_only else ''}{kind.suffix}"
    _check_free(out, force)
    partial = out.with_name(f"{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            kind.write(partial, weights, encoder_only, about)
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ExportError(f"'{out}' cannot be written ({reason})") from error
    return Exported(out, len(weights), sum(p.numel() for p in model.parameters()), about)


def _check_free(out: Path | None, force: bool) -> None:
    if out is not None and out.is_dir():
        raise ExportError(f"--out is '{out}', but that is a folder; name a file")
    if out is not None and out.exists() and not force:
        raise ExportError(f"'{out}' is there already; --force replaces it, --out names another file")


def _run_folder(checkpoint: Path) -> Path:
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder


def _empty_model(about: About, encoder_only: bool) -> Encoder:
    try:
        config = ModelConfig(**about.model_config)
    except (TypeError, ValueError, KeyError) as error:
        raise ExportError(f"checkpoint '{about.path}' does not hold a MuM ({error})") from None
    with torch.device("meta"):
        return Encoder(config) if encoder_only else MuM(config)


def _select(about: About, tensors: Mapping[str, Tensor], model: Encoder) -> dict[str, Tensor]:
    """The tensors of the model, in its order."""
    wanted = model.state_dict()
    wrong = [name for name, like in wanted.items() if name not in tensors or tensors[name].shape != like.shape]
    if wrong:
        raise ExportError(f"checkpoint '{about.path}' does not hold the model that it names: {wrong[0]} does not fit")
    return {name: tensors[name] for name in wanted}


def _parser() -> argparse.ArgumentParser:
    formats = "\n".join(f"  {name:13}{kind.meaning} ({kind.suffix})" for name, kind in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fastmum.export",
        description="Write the weights of a run's newest checkpoint that is whole, for use outside of training.",
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, of checkpoints, or one checkpoint")
    parser.add_argument("--format", choices=FORMATS, default="released", help="see below (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: mum_<step>.<suffix> in the run's folder")
    parser.add_argument("--encoder-only", action="store_true", help="without the decoder, as features are computed")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        done = export(args.run, args.format, args.out, args.encoder_only, args.force)
    except (CheckpointError, ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    count = f"{done.parameters:,}" if done.parameters < 1e5 else f"{done.parameters / 1e6:.1f} M"
    print(f"{done.file}: {count} parameters in {done.tensors} tensors, of step {done.about.step} ({done.about.path})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
