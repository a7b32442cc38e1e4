"""The formats, and what all of them have in common: nothing is replaced unasked, and what is there is whole."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmum.export.dinov3_folder import dinov3_features, write_dinov3
from fastmum.export.errors import ExportError
from fastmum.export.onnx_file import check_onnx, onnx_features, write_onnx
from fastmum.export.released import write_released, write_safetensors
from fastmum.pretrained import Pretrained, build, read_pretrained

log = logging.getLogger(__name__)

# Norm of the features' difference over their norm, by what positions are computed in: sums in another order change
# features in float32 a little, and now and then round a bfloat16 the other way.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


class Format(NamedTuple):
    """A way to write weights.

    Args:
        suffix: of what is written.
        meaning: for the help.
        write: given where, and the weights.
        folder: whether it writes a folder, else a file.
        features: of the encoder alone, by another package: patch tokens of images as that reads what was written, and
            a name and version of it, or None where it is not installed. None: the weights themselves are written.
        rounds: whether positions in bfloat16 can be told.
        check: looks for packages that writing needs.
    """

    suffix: str
    meaning: str
    write: Callable[[Path, Pretrained], None]
    folder: bool = False
    features: Callable[[Path, Tensor], tuple[str, Tensor] | None] | None = None
    rounds: bool = True
    check: Callable[[], None] = lambda: None


FORMATS = {
    "released": Format(".pth", "a state dict by torch.save, as the released checkpoints", write_released),
    "safetensors": Format(
        ".safetensors", "float32, the model's sizes as JSON in the metadata key model_config", write_safetensors
    ),
    "hf": Format(
        "_hf", "the encoder as a folder for DINOv3ViTModel.from_pretrained of transformers",
        write_dinov3, folder=True, features=dinov3_features, rounds=False,
    ),
    "onnx": Format(
        ".onnx", "the encoder's features, any number of images of any size",
        write_onnx, features=onnx_features, check=check_onnx,
    ),
}  # fmt: skip


ALIASES = {"transformers": "hf", "huggingface": "hf"}


class Exported(NamedTuple):
    """What was written.

    Args:
        file: where; a folder for some formats.
        tensors: how many of the model.
        parameters: how many numbers a training run learns in them.
        about: the weights that were read.
        agreement: how its features compare with fastmum's, and by which package; empty where none compared them.
    """

    file: Path
    tensors: int
    parameters: int
    about: Pretrained
    agreement: str = ""


def export(
    run: str | os.PathLike[str],
    name: str = "released",
    out: Path | None = None,
    encoder_only: bool = False,
    force: bool = False,
    **overrides: Any,
) -> Exported:
    """Write weights in another format.

    Args:
        run: a run, whose newest checkpoint that is whole is taken, or whatever `fastmum.load_pretrained` reads.
        name: of the format, or another that it goes by.
        out: what to write; None: in the run's folder, named after the step, or beside the file that was read.
        encoder_only: leave the decoder away; some formats always do.
        force: replace what is there.
        overrides: of `fastmum.load_pretrained`.

    Raises:
        WeightsError: nothing to be read.
        ExportError: it cannot be written, a package that writing needs is absent, or what was written computes other
            features.
    """
    kind = FORMATS.get(ALIASES.get(name, name))
    if kind is None:
        raise ExportError(f"the format is '{name}', but must be one of {', '.join(FORMATS)}")
    kind.check()
    _check_free(out, kind, force)
    if encoder_only or kind.features:
        overrides["encoder_only"] = True
    source = read_pretrained(run, **overrides)
    if source.rope_dtype != torch.float32 and not kind.rounds:
        log.warning("positions are computed in float32 there; in '%s' they are in bfloat16", source.path)
        source = read_pretrained(run, **{**overrides, "rope_dtype": torch.float32})
    out = out or _default(source, "_encoder" if encoder_only and not kind.features else "", kind.suffix)
    _check_free(out, kind, force)
    partial = out.with_name(f"{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        try:
            kind.write(partial, source)
            agreement = _compare(partial, kind, source) if kind.features else ""
            for file in partial.iterdir() if kind.folder else [partial]:
                _sync(file)
            _replace(partial, out)
        finally:
            _remove(partial)
    except ExportError:
        raise
    except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ExportError(f"'{out}' cannot be written ({reason})") from error
    learnt = sum(tensor.numel() for key, tensor in source.state.items() if not key.endswith(".periods"))
    return Exported(out, len(source.state), learnt, source, agreement)


def _compare(written: Path, kind: Format, source: Pretrained) -> str:
    """How features of noise, as another package computes them from what was written, compare with ours."""
    side = source.config.patch_size
    images = torch.randn(2, source.config.in_chans, 4 * side, 6 * side, generator=torch.Generator().manual_seed(0))
    found = kind.features(written, images)
    if found is None:
        return ""
    package, theirs = found
    with torch.inference_mode():
        ours = build(source).forward_features(images)["x_norm_patchtokens"]
    difference = ((theirs - ours).norm() / ours.norm()).item()
    if not difference < TOLERANCE[source.rope_dtype]:
        raise ExportError(f"{package} computes other features from what was written: they differ by {difference:.1e}")
    return f"features of {package} agree to {difference:.0e}"


def _check_free(out: Path | None, kind: Format, force: bool) -> None:
    if out is None or not out.exists():
        return
    if out.is_dir() and not kind.folder:
        raise ExportError(f"--out is '{out}', but that is a folder; name a file")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not force:
        raise ExportError(f"'{out}' is there already; --force replaces it, --out names another {_what(kind)}")
    if out.is_dir() and not (out / "config.json").is_file():
        raise ExportError(f"'{out}' is a folder of something else, which --force does not replace; name another")


def _what(kind: Format) -> str:
    return "folder" if kind.folder else "file"


def _default(source: Pretrained, part: str, suffix: str) -> Path:
    """In the folder of a run, named after the step; beside a file, named after it."""
    path = source.path.absolute()
    if source.step is None or path.is_file():
        return source.path.with_name(f"{path.name if path.is_dir() else path.stem}{part}{suffix}")
    folder = path.parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    return folder / f"mum_{source.step:07d}{part}{suffix}"


def _sync(file: Path) -> None:
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _replace(partial: Path, out: Path) -> None:
    if partial.is_dir():
        _remove(out)  # a folder replaces an empty one only
    partial.replace(out)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
