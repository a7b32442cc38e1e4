"""Attentive probes in plain PyTorch as CAPI trains them: a module for each, their losses averaged, one AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentiveProbe(nn.Module):
    """Attention of a learnt query to all tokens, heads of width 64, then a linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.empty(width))
        self.kv, self.linear = nn.Linear(width, 2 * width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) -> logits (B, classes)."""
        width = x.shape[-1]
        keys, values = self.kv(x).unflatten(2, (2, width // 64, 64)).permute(2, 0, 3, 1, 4)
        query = self.query_token.view(1, width // 64, 1, 64).expand(len(x), -1, -1, -1)
        return self.linear(F.scaled_dot_product_attention(query, keys, values).flatten(1))


class SeparateProbes(nn.ModuleList):
    """Probes of (learning rate, weight decay) each; biases have no decay."""

    def __init__(self, sweep: Sequence[tuple[float, float]], width: int, classes: int) -> None:
        super().__init__(AttentiveProbe(width, classes) for _ in sweep)
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for probe, (rate, decay) in zip(self, sweep, strict=True):
            for name, parameter in probe.named_parameters():
                groups.setdefault((rate, 0.0 if "bias" in name else decay), []).append(parameter)
        options = [{"params": some, "lr": rate, "weight_decay": decay} for (rate, decay), some in groups.items()]
        self.optimizer = torch.optim.AdamW(options, betas=(0.9, 0.95), fused=True)

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """One step of all probes; returns their losses."""
        logits = torch.stack([probe(x) for probe in self], dim=-1)
        losses = F.cross_entropy(logits, labels[:, None].expand(-1, len(self)), reduction="none").mean(0)
        self.optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        self.optimizer.step()
        return losses.detach()
