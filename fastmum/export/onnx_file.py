"""ONNX: the encoder's features as one file, for any number of images of any size.

Legend: F frames, L tokens of a frame, P of them patches, D width, h heads, d width of a head.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from fastmum.model.encoder import Encoder
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.pretrained import Pretrained, build

INPUT, OUTPUTS = "images", ("x_norm_clstoken", "x_norm_patchtokens")


class EncoderGraph(nn.Module):
    """An encoder's `forward_features` of normalised images in standard operators, none of `fastmum.kernels`.

    Shapes are static except for the number of images and their sides. Positions in bfloat16 are emulated by rounding
    after every float32 operation, for runtimes without bfloat16 arithmetic.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(F, 3, H, W) float32, ImageNet-normalised -> normed CLS (F, D) and patch tokens (F, P, D)."""
        encoder, side = self.encoder, self.encoder.config.patch_size
        patches = encoder.patch_embed.proj(images).flatten(2).mT
        x_FLD = torch.cat([encoder.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        sin, cos = self._tables(images.shape[2] // side, images.shape[3] // side)
        block: Any
        for block in encoder.blocks:
            qkv = block.attn.qkv(block.norm1(x_FLD)).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q_FhLd, k_FhLd = self._rotate(qkv[:2], sin, cos)
            heads = F.scaled_dot_product_attention(q_FhLd, k_FhLd, qkv[2])
            x_FLD = x_FLD + block.attn.proj(heads.transpose(1, 2).flatten(2))
            x_FLD = x_FLD + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x_FLD))))
        x_FLD = encoder.norm(x_FLD)
        return x_FLD[:, 0], x_FLD[:, 1:]

    def _tables(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """As `AxialRope.tables`, with a first row that does not rotate CLS, (L, d) each."""
        r, periods = self._round, self.encoder.rope_embed.periods.float()
        y, x = (r(r(r(torch.arange(n) + 0.5) / n) * 2 - 1) for n in (rows, columns))
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
        angles = r(r(2 * math.pi * coords[:, :, None]) / periods).flatten(1).tile(2)
        angles = torch.cat([torch.zeros(1, angles.shape[1]), angles])
        return r(angles.sin()), r(angles.cos())

    def _rotate(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        r, x = self._round, self._round(x)
        first, second = x.chunk(2, dim=-1)
        return r(r(x * cos) + r(torch.cat([-second, first], dim=-1) * sin))

    def _round(self, x: Tensor) -> Tensor:
        dtype = self.encoder.rope_embed.periods.dtype
        return x if dtype == torch.float32 else x.to(dtype).float()


def write_onnx(file: Path, source: Pretrained) -> None:
    """Write `EncoderGraph`, float32, with its weights inside.

    Input "images" (batch, 3, height, width), ImageNet-normalised, height and width any multiples of the patch size;
    outputs "x_norm_clstoken" (batch, D) and "x_norm_patchtokens" (batch, patches, D). The metadata say how images are
    prepared, and what the weights are.
    """
    side = source.config.patch_size
    # No dimension of the example may be 1, which the exporter would take for a constant.
    images = torch.zeros(2, source.config.in_chans, 2 * side, 3 * side)
    dynamic = {0: Dim("batch"), 2: side * Dim("rows"), 3: side * Dim("columns")}
    program = torch.onnx.export(
        EncoderGraph(build(source)).eval(), (images,), dynamo=True, verbose=False, dynamic_shapes=(dynamic,),
        input_names=[INPUT], output_names=OUTPUTS,
    )  # fmt: skip
    assert program is not None
    from onnx_ir import Shape  # of onnxscript

    (inputs,), (_, patches) = program.model.graph.inputs, program.model.graph.outputs
    inputs.shape = Shape(["batch", source.config.in_chans, "height", "width"])
    patches.shape = Shape(["batch", "patches", source.config.embed_dim])
    about = {
        "model_config": dataclasses.asdict(source.config), "patch_size": side, "image_size": source.image_size,
        "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "step": source.step,
        "positions": str(source.rope_dtype).removeprefix("torch."), "weights": source.path.name,
    }  # fmt: skip
    # As JSON; a string stays as it is.
    words = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items() if v is not None}
    program.model.metadata_props.update(words)
    program.save(file, external_data=False)


def onnx_features(file: Path, source: Pretrained, images: Tensor) -> tuple[str, Tensor] | None:
    """The version of onnxruntime and its patch tokens of normalised images; None if it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (patches,) = session.run(OUTPUTS[1:], {INPUT: images.numpy()})
    return f"onnxruntime {onnxruntime.__version__}", torch.from_numpy(patches)
