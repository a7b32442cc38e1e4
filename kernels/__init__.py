"""The operations between the matrix products, imported as `fastmum.kernels`.

One file per operation, from the public function down to the jitted kernel. See docs/kernels.md.
"""

from pathlib import Path

import fastmum

_kernels, _package = Path(__file__).resolve().parent, Path(fastmum.__file__).resolve().parent
if _kernels not in (_package / "kernels", _package.parent / "kernels"):
    raise ImportError(
        f"fastmum is imported from '{_package}', but fastmum.kernels from '{_kernels}', another checkout: "
        "run `pip install -e .` in the checkout that you use"
    )

# ruff: noqa: E402
from fastmum.kernels.correlation import local_correlation
from fastmum.kernels.feedforward import mlp
from fastmum.kernels.loss import patch_loss
from fastmum.kernels.matmul import linear
from fastmum.kernels.muon import orthogonalize
from fastmum.kernels.norm import add_norm
from fastmum.kernels.patches import gather_patches
from fastmum.kernels.projection import rotary_projection
from fastmum.kernels.rope import rope_qk
from fastmum.kernels.symmetric import symmetric_product
from fastmum.kernels.tokens import gather_tokens, scatter_tokens
from fastmum.kernels.total_norm import total_norm

__all__ = [
    "add_norm", "gather_patches", "gather_tokens", "linear", "local_correlation", "mlp", "orthogonalize", "patch_loss",
    "rope_qk", "rotary_projection", "scatter_tokens", "symmetric_product", "total_norm",
]  # fmt: skip
