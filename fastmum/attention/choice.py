"""The table of backends, and which one runs."""

from __future__ import annotations

import torch

from fastmum.attention.backend import HALF, AttentionError, Backend, constant_in_graphs
from fastmum.attention.flash import Flash
from fastmum.attention.flash_attn import FlashAttn2
from fastmum.attention.flash_attn_4 import FlashAttn4
from fastmum.attention.flex import Flex
from fastmum.attention.sdpa import Sdpa
from fastmum.attention.xformers import Xformers

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Flash(), FlashAttn2(), FlashAttn4(), Xformers(), Sdpa(), Flex())
}


def choose_backend(
    name: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Backend:
    """The backend of that name; "auto" is `flash` on CUDA in bfloat16 and float16, and `sdpa` else.

    Args:
        name: "auto" or a key of `BACKENDS`.
        device, dtype: of queries, keys and values.

    Raises:
        AttentionError: no such backend, or it cannot do that; the message says why and what to do.
    """
    return BACKENDS[_usable(name, str(device), str(dtype).removeprefix("torch."))]


@constant_in_graphs  # the compiler need not follow how packages are found
def _usable(name: str, device: str, dtype: str) -> str:
    device, dtype = torch.device(device), getattr(torch, dtype)
    if name == "auto":
        name = "flash" if device.type == "cuda" and dtype in HALF else "sdpa"
    if name not in BACKENDS:
        raise AttentionError(f"attention backend '{name}' is unknown; one of auto, {', '.join(BACKENDS)} is allowed")
    reason = BACKENDS[name].why_not(device) or BACKENDS[name].why_not_dtype(dtype)
    if reason is not None:
        raise AttentionError(f"attention backend '{name}' cannot be used: {reason}; 'auto' takes what is there")
    return name
