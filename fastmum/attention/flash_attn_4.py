"""The `flash-attn-4` package (CuTe): Hopper and later, since its backward pass does not exist for older GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmum.attention.backend import HALF, Backend
from fastmum.attention.spans import Spans


class FlashAttn4(Backend):
    """`flash_attn.cute.flash_attn_varlen_func`."""

    name = "flash_attn_4"
    dtypes = HALF
    package = "flash_attn.cute"
    install = "pip install 'fastmum[flash4]'"

    def why_not(self, device: torch.device) -> str | None:
        reason = super().why_not(device)
        if reason is None:
            major, minor = torch.cuda.get_device_capability(device)
            if major < 9:
                return f"it trains on sm_90 and later only, and this is sm_{major}{minor}"
        return reason

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Spans) -> Tensor:
        from flash_attn.cute import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=plan.cu_q,
            cu_seqlens_k=plan.cu_k,
            max_seqlen_q=plan.max_q,
            max_seqlen_k=plan.max_k,
        )
        return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp as well
