"""torch's own variable-length attention: FlashAttention 2 or cuDNN, FlashAttention 3 or 4 where installed."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from fastmum.attention.backend import HALF, Backend, constant_in_graphs, is_installed
from fastmum.attention.spans import Spans

log = logging.getLogger(__name__)


class Flash(Backend):
    """`torch.nn.attention.varlen.varlen_attn`, the default on CUDA."""

    name = "flash"
    dtypes = HALF
    package = "torch.nn.attention.varlen"
    install = "it comes with torch 2.10 and later"

    def plan(self, spans: Spans, device: torch.device) -> Spans:
        if device.type == "cuda":
            _activate_newest(device)
        return spans.to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Spans) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k)


@constant_in_graphs
@lru_cache
def _activate_newest(device: torch.device) -> None:
    """Put FlashAttention 3 (Hopper) or 4 (Blackwell) in the place of torch's own, where its package is installed."""
    from torch.nn import attention

    major, _ = torch.cuda.get_device_capability(device)
    wanted = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}.get(major)
    if wanted is None or not hasattr(attention, "activate_flash_attention_impl"):
        return
    name, package = wanted
    try:
        if not is_installed(package):
            return
        attention.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError, ValueError) as error:
        log.warning("%s is installed but torch cannot use it (%s): FlashAttention 2 of torch runs", name, error)
    else:
        log.info("flash attention by %s", name)
