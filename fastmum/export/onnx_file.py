"""ONNX: the encoder's features as one file, for any number of images of any size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from fastmum.export.errors import ExportError
from fastmum.export.graph import EncoderGraph
from fastmum.export.quiet import quiet
from fastmum.pretrained import Pretrained, build

INSTALL = "pip install 'fastmum[onnx]'"
INPUT, OUTPUTS = "images", ("x_norm_clstoken", "x_norm_patchtokens")


def check_onnx() -> None:
    """Look for what writing needs.

    Raises:
        ExportError: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401 (torch's exporter needs both)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"the format onnx needs {error.name}: {INSTALL}") from None


def write_onnx(file: Path, source: Pretrained) -> None:
    """Write the graph of `EncoderGraph`, float32, with its weights inside.

    Input "images" (batch, 3, H, W), ImageNet-normalised, H and W any multiples of the patch size; outputs
    "x_norm_clstoken" (batch, D) and "x_norm_patchtokens" (batch, P, D).

    Raises:
        OSError: it cannot be written.
    """
    side = source.config.patch_size
    # No dimension of the example may be 1, or the exporter takes it for a constant.
    images = torch.zeros(2, source.config.in_chans, 2 * side, 3 * side)
    dynamic = {0: Dim("batch"), 2: side * Dim("rows"), 3: side * Dim("columns")}
    with quiet():
        program = torch.onnx.export(
            EncoderGraph(build(source)).eval(), (images,), dynamo=True, verbose=False, dynamic_shapes=(dynamic,),
            input_names=[INPUT], output_names=OUTPUTS,
        )  # fmt: skip
    program.save(file, external_data=False)


def onnx_features(file: Path, images: Tensor) -> tuple[str, Tensor] | None:
    """Patch tokens of normalised images by onnxruntime, and its version; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (patches,) = session.run(OUTPUTS[1:], {INPUT: images.numpy()})
    return f"onnxruntime {onnxruntime.__version__}", torch.from_numpy(patches)
