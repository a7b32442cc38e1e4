"""Models of fastmum for the evaluations of facebookresearch/capi, which import the file that `model_path` names.

From a checkout of CAPI, in an environment with fastmum; `python -m fastmum.capi_loader` prints the path of this file:

    python eval_segmentation.py model_path=$(python -m fastmum.capi_loader) \
        model_loader_kwargs.pretrained_weights=runs/mine output_dir=out train_dataset_name=... test_dataset_name=...
"""

from typing import Any

from torch import Tensor, nn

from fastmum.engine.device import pick_device
from fastmum.model.encoder import Encoder
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.model.options import normalise
from fastmum.pretrained import WeightsError, load_encoder


class VisionEncoder(nn.Module):
    """An encoder with CAPI's interface: `patch_size` in pixels, `embed_dim`, and `forward`."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch_size, self.embed_dim = encoder.config.patch_size, encoder.config.embed_dim

    def forward(self, images: Tensor) -> tuple[Tensor | None, None, Tensor]:
        """ImageNet-normalised images (B, 3, H, W) -> normed CLS (B, D), no registers, patches (B, H / p, W / p, D).

        The outputs are float32, as CAPI's float32 classifiers need, whatever the encoder's dtype. CLS is None if the
        encoder has none (CroCo).
        """
        encoder = self.encoder
        if (encoder.mean, encoder.std) != (IMAGENET_MEAN, IMAGENET_STD):
            zero = [-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
            images = normalise(normalise(images, zero, [1 / std for std in IMAGENET_STD]), encoder.mean, encoder.std)
        (tokens,) = encoder.tokens(images, norm=True)
        cls = None if tokens.cls is None else tokens.cls.float()
        return cls, None, tokens.patch.float().unflatten(1, tokens.grid)


def __model_loader__(pretrained_weights: str, device: str | None = None, **overrides: Any) -> VisionEncoder:  # noqa: N807
    """The function that CAPI calls with its `model_loader_kwargs`; returns the encoder in eval mode.

    Args:
        pretrained_weights: anything that `fastmum.load_encoder` reads.
        device: default: the GPU if there is one; ConfigError if there is no such device.
        overrides: of `fastmum.load_encoder`; WeightsError for encoder_only, which is always True.
    """
    if "encoder_only" in overrides:
        raise WeightsError("model_loader_kwargs.encoder_only cannot be set: CAPI only evaluates the encoder")
    where = pick_device(str(device or "auto"), key="model_loader_kwargs.device")
    return VisionEncoder(load_encoder(pretrained_weights, device=where, **overrides)).eval()


if __name__ == "__main__":
    print(__file__)
