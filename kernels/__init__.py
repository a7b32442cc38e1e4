"""The operations between the matrix products, imported as `fastmum.kernels`.

`reference` is the mathematics of each in plain PyTorch; the names below are what the model calls.
"""

from fastmum.kernels.reference import gather_patches, gather_tokens, patch_loss, rope_qk, scatter_tokens

__all__ = ["gather_patches", "gather_tokens", "patch_loss", "rope_qk", "scatter_tokens"]
