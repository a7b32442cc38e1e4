"""bfloat16 weights to compute with, float32 weights to learn.

Under autocast every step casts every matrix to bfloat16, and every gradient back: 12 bytes a parameter that compute
nothing, and take a quarter as long as the matrix products on a CPU. Here the model holds the matrices in bfloat16,
their gradients are bfloat16, and the optimiser keeps the float32 master of each and renews both in one pass. The
numbers are those of autocast, bit for bit, with one backward pass a step: it is the same rounding, done once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PRODUCTS = (nn.Linear, nn.Conv2d)  # modules whose weights and biases autocast casts


class MasterWeights:
    """The float32 weights of a model, of which it computes with `dtype` copies.

    Args:
        model: its matrices and their biases become `dtype`; everything else stays as it is.
        dtype: torch.bfloat16, or torch.float32 for a model that needs no copies.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        self._masters: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, PRODUCTS):
                for key, p in module.named_parameters(prefix=name, recurse=False):
                    if p.dtype != dtype:
                        self._masters[key] = p.detach()
                        p.data = p.detach().to(dtype)
        model.register_load_state_dict_post_hook(self._renew)

    def named(self) -> list[tuple[str, nn.Parameter, Tensor | None]]:
        """Name, parameter of the model and master, None where the parameter is float32 itself."""
        return [(name, p, self._masters.get(name)) for name, p in self.model.named_parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the model with its masters: float32, whatever it computes with."""
        state = self.model.state_dict()
        return state | {name: master.contiguous() for name, master in self._masters.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take weights, unrounded; the model's own `load_state_dict` knows them only as it computes with them."""
        self.model.load_state_dict(state)  # rounds, and complains about what does not fit
        for name, master in self._masters.items():
            master.copy_(state[name])

    def _renew(self, model: nn.Module, _incompatible: object) -> None:
        """Masters of weights that were loaded behind our back."""
        for name, master in self._masters.items():
            master.copy_(model.get_parameter(name))
