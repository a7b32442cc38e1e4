"""The `flash-attn` 2 package."""

from __future__ import annotations

from torch import Tensor

from fastmum.attention.backend import HALF, Backend
from fastmum.attention.spans import Spans


class FlashAttn2(Backend):
    """`flash_attn.flash_attn_varlen_func`."""

    name = "flash_attn"
    dtypes = HALF
    package = "flash_attn.flash_attn_interface"
    install = "pip install 'fastmum[flash]' builds it from source, which needs nvcc"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Spans) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k)
