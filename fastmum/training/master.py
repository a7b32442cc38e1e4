"""bfloat16 weights to compute with, float32 weights to learn.

Under autocast every step casts every matrix to bfloat16, and every gradient back: 12 bytes a parameter that compute
nothing, and take a quarter as long as the matrix products on a CPU. Here the model holds the matrices in bfloat16,
their gradients are bfloat16, and the optimiser keeps the float32 master of each and renews both in one pass. The
numbers are those of autocast, bit for bit, with one backward pass a step: it is the same rounding, done once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

PRODUCTS = (nn.Linear, nn.Conv2d)  # modules whose weights and biases autocast casts


class Weight(NamedTuple):
    """One weight of a model.

    Args:
        name: in the model's `state_dict`.
        parameter: that the model computes with.
        master: float32, that is learnt; the parameter itself where that is float32.
    """

    name: str
    parameter: nn.Parameter
    master: Tensor

    @property
    def is_copied(self) -> bool:
        """Whether the parameter is a rounded copy of the master."""
        return self.master is not self.parameter


class MasterWeights:
    """The float32 weights of a model, of which it computes with `dtype` copies.

    Args:
        model: its matrices and their biases become `dtype`; everything else stays as it is.
        dtype: torch.bfloat16, or torch.float32 for a model that needs no copies, such as one that FSDP shares out: its
            own copies are made when they are gathered.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        masters: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, PRODUCTS):
                for key, p in module.named_parameters(prefix=name, recurse=False):
                    if p.dtype != dtype:
                        masters[key] = p.detach()
                        p.data = p.detach().to(dtype)
        self.weights = [Weight(name, p, masters.get(name, p)) for name, p in model.named_parameters()]
        model.register_load_state_dict_post_hook(self._renew_masters)

    @torch.no_grad()
    def renew_copies(self) -> None:
        """Round the masters into the parameters, after masters were loaded."""
        for weight in self.weights:
            if weight.is_copied:
                weight.parameter.copy_(weight.master)

    @torch.no_grad()
    def _renew_masters(self, model: nn.Module, _incompatible: object) -> None:
        """Masters of weights that were loaded behind our back."""
        for weight in self.weights:
            if weight.is_copied:
                weight.master.copy_(weight.parameter)
