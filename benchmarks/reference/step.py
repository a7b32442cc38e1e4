"""The training step of the released model in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from benchmarks.reference.model import ReferenceMuM

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of values in 0..1, RGB
IMAGENET_STD = (0.229, 0.224, 0.225)


def build_optimizer(
    model: ReferenceMuM,
    lr: float,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.95),
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """AdamW of the released configuration; biases, norms and other 1-D parameters do not decay.

    Without `fused` it is torch's choice: foreach on CUDA, on a CPU a loop over parameters (its fused one is faster).
    """
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def normalise(frames: Tensor) -> Tensor:
    """Raw frames (B, S, 3, H, W) uint8 -> the model's images, float32."""
    mean, std = (torch.tensor(x, device=frames.device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (frames.float() / 255 - mean) / std


def train_step(
    model: ReferenceMuM,
    optimizer: torch.optim.Optimizer,
    frames: Tensor,
    noise: Tensor,
    mask_ratio: float = 0.75,
    precision: str = "bf16",
    lap: Callable[[str], None] = lambda phase: None,
) -> tuple[float, float]:
    """Forward, backward, norm of the gradient (for the log: nothing is clipped), update.

    Args:
        frames: (B, S, 3, H, W) uint8.
        noise: (B*S, L) uniform, for the masks.
        precision: "bf16" (autocast) or "fp32".
        lap: called at the end of each phase with its name.

    Returns:
        loss, norm of the gradient.
    """
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = model(normalise(frames), mask_ratio, noise).loss
    lap("forward")
    loss.backward()
    lap("backward")
    norm = get_total_norm([p.grad for p in model.parameters()])
    lap("norm")
    optimizer.step()
    optimizer.zero_grad()
    lap("optimizer")
    loss, norm = torch.stack([loss.detach(), norm]).tolist()  # the one wait for the device
    return loss, norm
