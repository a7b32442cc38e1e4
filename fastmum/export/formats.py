"""The formats, and `export`, which replaces existing files only on request and never leaves incomplete ones."""

import dataclasses
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmum.errors import FastmumError, first_line, some_names
from fastmum.export.folders import hf_features, model_card, timm_features, write_hf, write_timm
from fastmum.export.onnx_file import onnx_features, write_onnx
from fastmum.files import atomic_path
from fastmum.model.options import DEFAULT
from fastmum.pretrained import Pretrained, build, read_pretrained

log = logging.getLogger(__name__)

# Largest ||difference|| / ||features||, by the dtype of positions: another order of sums changes float32 features a
# little, and sometimes rounds a bfloat16 the other way.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
RELEASED_HEADS = 16  # decoder heads of the released code's vit_base() and vit_large()


class ExportError(FastmumError):
    """Weights that cannot be exported."""


def released_state(weights: Mapping[str, Tensor], encoder_only: bool) -> dict[str, Tensor]:
    """Weights in the dtypes of the released files: float32, except bfloat16 periods in the encoder-only file."""
    periods = torch.bfloat16 if encoder_only else torch.float32
    return {name: t.to(periods if name == "rope_embed.periods" else torch.float32) for name, t in weights.items()}


def _write_released(file: Path, source: Pretrained, wrap: str | None = None) -> None:
    heads, sizes = source.config.decoder_num_heads, dataclasses.asdict(source.config)
    if not source.encoder_only and heads != RELEASED_HEADS:
        arguments = ", ".join(f"{name}={size}" for name, size in sizes.items() if name != "norm_eps")
        log.warning(
            "this model has %d decoder heads, but vit_large() of the released code has %d and refuses the file: build "
            "MuMAutoEncoder(%s) instead, or export --encoder-only; the preset mum_vitl16_released trains with %d",
            heads, RELEASED_HEADS, arguments, RELEASED_HEADS,
        )  # fmt: skip
    state = released_state(source.state, source.encoder_only)
    with open(file, "wb") as opened:  # torch.save refuses some paths, such as hidden ones without a suffix
        torch.save({wrap: state} if wrap else state, opened)


def _write_safetensors(file: Path, source: Pretrained) -> None:
    metadata = {"format": "pt", "model_config": json.dumps(dataclasses.asdict(source.config))}
    about = {"step": source.step, "image_size": source.image_size}
    metadata |= {name: str(value) for name, value in about.items() if value is not None}
    # The dtype of the encoder's periods is that of its positions.
    dtypes = {"rope_embed.periods": source.rope_dtype}
    save_file({n: t.to(dtypes.get(n, torch.float32)).contiguous() for n, t in source.state.items()}, file, metadata)


# Name and version of a package, and its patch tokens of images (F, 3, H, W) from the written file of some weights; None
# if it is not installed.
ReadFeatures = Callable[[Path, Pretrained, Tensor], tuple[str, Tensor] | None]


class Format(NamedTuple):
    """A file format of exported weights."""

    suffix: str
    meaning: str  # for the help
    write: Callable[..., None]  # (Path, Pretrained), and `wrap` for the format released
    folder: str = ""  # it writes a folder with a model card, which names this package
    features: ReadFeatures | None = None  # formats without this hold all weights, the others only the encoder
    bfloat16_positions: bool = True  # the format can express them
    packages: tuple[str, ...] = ()  # for writing, from the extra of the format's name


FORMATS = {
    "released": Format(".pth", "a state dict by torch.save, as the released checkpoints", _write_released),
    "safetensors": Format(
        ".safetensors", "float32, with the model's sizes as JSON in the metadata key model_config", _write_safetensors),
    "hf": Format(
        "_hf", "the encoder as a folder for DINOv3ViTModel.from_pretrained of transformers",
        write_hf, folder="transformers", features=hf_features, bfloat16_positions=False),
    "timm": Format(
        "_timm", "the encoder as a folder for timm.create_model('local-dir:FOLDER', pretrained=True)",
        write_timm, folder="timm", features=timm_features, bfloat16_positions=False),
    "onnx": Format(
        ".onnx", "the encoder's features, any number of images of any size",
        write_onnx, features=onnx_features, packages=("onnx", "onnxscript")),
}  # fmt: skip
ALIASES = {"transformers": "hf", "huggingface": "hf"}


class Exported(NamedTuple):
    """A written export."""

    file: Path  # a folder for some formats
    tensors: int
    parameters: int  # learnt values in the tensors
    source: Pretrained
    agreement: str = ""  # with the features of another package; empty if there was no comparison


def export(
    run: str | os.PathLike[str], name: str = "released", out: Path | None = None, encoder_only: bool = False,
    force: bool = False, wrap: str | None = None, license: str | None = None, **overrides: Any,
) -> Exported:  # fmt: skip
    """Write weights in another format.

    ExportError: the file cannot be written, a package is missing, weights are not finite, or the written features are
    wrong.

    Args:
        run: a run, whose newest whole checkpoint is read, or anything else that `fastmum.load_pretrained` reads.
        name: a key of `FORMATS` or `ALIASES`.
        out: default: in the run's folder, named after the step, or next to the file that was read.
        encoder_only: omit the decoder; some formats always do.
        force: replace an existing file, or an existing folder of the same format.
        wrap: key under which the format "released" writes the state dict, {wrap: state}.
        license: of the weights, for the model card of a folder.
        overrides: of `fastmum.load_pretrained`; WeightsError as there.
    """
    kind = FORMATS.get(ALIASES.get(name, name))
    if kind is None:
        raise ExportError(f"the format is '{name}', but must be one of {', '.join(FORMATS)}")
    for package in kind.packages:
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"the format {name} needs {package}: pip install 'fastmum[{name}]'")
    if wrap and kind.write is not _write_released:
        raise ExportError(f"--wrap is '{wrap}', but only the format released is a state dict that can be wrapped")
    if license and not kind.folder:
        raise ExportError(f"--license is '{license}', but the format {name} has no model card")
    if encoder_only or kind.features:
        overrides["encoder_only"] = True
    source = read_pretrained(run, **overrides)
    if source.options != DEFAULT:
        raise ExportError(f"'{source.path}' is a {source.kind}, but only MuM's encoders are exported")
    if source.rope_dtype != torch.float32 and not kind.bfloat16_positions:
        log.warning("the format computes positions in float32; in '%s' they are bfloat16", source.path)
        source = read_pretrained(run, **{**overrides, "rope_dtype": torch.float32})
    if broken := [key for key, tensor in source.state.items() if not tensor.isfinite().all()]:
        named = some_names(broken)
        raise ExportError(f"'{source.path}' has weights that are not finite ({named}): export an earlier step")
    out = out or _default(source, "_encoder" if encoder_only and not kind.features else "", kind.suffix)
    _check_free(out, kind, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as partial:
            with _quiet():
                kind.write(partial, source, **({"wrap": wrap} if wrap else {}))
                if kind.folder:
                    card = model_card(source, kind.folder, license)
                    (partial / "README.md").write_text(card, encoding="utf-8")
                agreement = _compare(partial, kind.features, source) if kind.features else ""
            for file in partial.iterdir() if kind.folder else [partial]:
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
    except ExportError:
        raise
    except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ExportError(f"'{out}' cannot be written ({reason})") from error
    parameters = sum(tensor.numel() for key, tensor in source.state.items() if not key.endswith(".periods"))
    return Exported(out, len(source.state), parameters, source, agreement)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of other packages, such as about optional ones, and torch's log below errors."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _compare(written: Path, read: ReadFeatures, source: Pretrained) -> str:
    """Compare another package's features of noise with ours."""
    side = source.config.patch_size
    images = torch.randn(2, source.config.in_chans, 4 * side, 6 * side, generator=torch.Generator().manual_seed(0))
    if (found := read(written, source, images)) is None:
        return ""
    package, theirs = found
    with torch.inference_mode():
        ours = build(source).forward_features(images)["x_norm_patchtokens"]
    difference = ((theirs - ours).norm() / ours.norm()).item()
    if not difference < TOLERANCE[source.rope_dtype]:
        raise ExportError(f"{package} computes other features from the written file: they differ by {difference:.1e}")
    return f"features of {package} agree to {difference:.0e}"


def _check_free(out: Path, kind: Format, force: bool) -> None:
    """Raise ExportError if `out` exists and must not be replaced; an empty folder may be."""
    if not out.exists() or (kind.folder and out.is_dir() and not any(out.iterdir())):
        return
    if out.is_dir() and not kind.folder:
        raise ExportError(f"--out is '{out}', but that is a folder; name a file")
    if not force:
        raise ExportError(f"'{out}' is there already; --force replaces it, --out names another one")
    if out.is_dir() and not (out / "config.json").is_file():
        raise ExportError(f"'{out}' is a folder of something else, which --force does not replace; name another")


def _default(source: Pretrained, part: str, suffix: str) -> Path:
    """In the folder of a run, named after the step; next to a file, named after it."""
    path = source.path.absolute()
    if source.step is None or path.is_file():
        return source.path.with_name(f"{path.name if path.is_dir() else path.stem}{part}{suffix}")
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return folder / f"mum_{source.step:07d}{part}{suffix}"
