"""The backend `flash`: torch's FlashAttention 2, 3 or 4 or cuDNN, whichever computes a run's batches fastest."""

import logging
from functools import lru_cache

import torch
from torch import Tensor, nn

from fastmum.attention.backend import HALF, Backend, Segments, constant_in_graphs
from fastmum.attention.varlen import Plan, agrees, attend_by, sample
from fastmum.measured import measured_times, milliseconds

log = logging.getLogger(__name__)
CUDNN = 92500  # older versions do not support empty segments, and tested ones fail on ragged batches


class Flash(Backend):
    """torch's fused kernels for packed segments; FlashAttention 3 (Hopper) or 4 (Blackwell) if it is installed."""

    name = "flash"
    dtypes = HALF
    package = "torch.nn.attention.varlen"
    install = "it comes with torch 2.10 and later"
    chosen: tuple[str, str] | None = None  # by `prepare`: for exact segments, and for those that CUDA graphs record

    def prepare(self, device: torch.device, dtype: torch.dtype, heads: int, width: int, segments: Segments) -> str:
        if device.type != "cuda":
            return self.name
        found, sizes = candidates(device), (device, dtype, heads, width)
        sound = [kernel for kernel in found if kernel == "FA2" or _agrees(kernel, *sizes)] or ["FA2"]
        times = _times(sound, *sizes, segments) if len(sound) > 1 else dict.fromkeys(sound, 0.0)
        fastest = min(times, key=lambda kernel: times[kernel])
        self.chosen = fastest, fastest if fastest != "cuDNN" else sound[0]
        activate(fastest)
        if len(sound) == 1:
            return f"{self.name} by {fastest}"
        measured = ", ".join(f"{kernel} {ms:.2f} ms" for kernel, ms in times.items())
        graphs = f", in CUDA graphs by {self.chosen[1]}" * (self.chosen[1] != fastest)
        return f"{self.name} by {fastest}{graphs} (forward and backward of a ragged batch: {measured})"

    def plan(self, segments: Segments, device: torch.device) -> Plan:
        kernel = "FA2"
        if device.type == "cuda":
            exact, padded = self.chosen or 2 * candidates(device)[:1]
            kernel = padded if segments.sizes is None else exact
            activate(kernel)
        return Plan(segments.to(device), kernel)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        return attend_by(q, k, v, plan)


@constant_in_graphs
@lru_cache
def candidates(device: torch.device) -> tuple[str, ...]:
    """Kernels that may run on a CUDA device; the first one is the default. Deterministic runs have no others."""
    major, _ = torch.cuda.get_device_capability(device)
    newest = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}.get(major)
    found = []
    if newest and hasattr(nn.attention, "activate_flash_attention_impl"):
        version, package = newest
        try:
            if Backend.is_installed(package):
                activate(version)
                found.append(version)
        except (ImportError, RuntimeError, ValueError) as error:
            log.warning("%s is installed but torch cannot use it (%s): using FlashAttention 2 of torch", version, error)
    if not found or hasattr(nn.attention, "restore_flash_attention_impl"):  # torch 2.10 cannot go back
        found.append("FA2")
    if newest and (torch.backends.cudnn.version() or 0) >= CUDNN:
        found.append("cuDNN")
    return tuple(found[:1] if torch.are_deterministic_algorithms_enabled() else found)


@constant_in_graphs
def activate(kernel: str) -> None:
    """Make torch's FlashAttention operator run version FA2, FA3 or FA4; nothing for others."""
    attention = nn.attention
    if kernel[:2] != "FA" or not hasattr(attention, "current_flash_attention_impl"):
        return
    version = None if kernel == "FA2" else kernel
    if attention.current_flash_attention_impl() == version:
        return
    if version is not None:
        attention.activate_flash_attention_impl(version)
    elif hasattr(attention, "restore_flash_attention_impl"):
        attention.restore_flash_attention_impl()


def _agrees(kernel: str, device: torch.device, dtype: torch.dtype, heads: int, width: int) -> bool:
    activate(kernel)
    return agrees(kernel, device, dtype, heads, width)


def _times(
    kernels: list[str], device: torch.device, dtype: torch.dtype, heads: int, width: int, segments: Segments
) -> dict[str, float]:
    """Milliseconds of forward and backward by each kernel, from the cache if this was measured before."""
    versions = torch.cuda.get_device_name(device), str(torch.__version__), torch.backends.cudnn.version()
    lengths = [cu.diff().tolist() for cu in (segments.cu_seqlens_q, segments.cu_seqlens_k)]

    def measure() -> dict[str, float]:
        q, k, v, grad = sample(segments, device, dtype, heads, width)
        plan, times = segments.to(device), {}
        for kernel in kernels:
            activate(kernel)
            run = lambda kernel=kernel: torch.autograd.grad(attend_by(q, k, v, Plan(plan, kernel)), (q, k, v), grad)  # noqa: E731
            times[kernel] = milliseconds(run)
        return times

    return measured_times("attention", repr((versions, str(dtype), heads, width, lengths, kernels)), kernels, measure)
