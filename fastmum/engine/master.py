"""bfloat16 weights to compute with, float32 weights to learn, in the four bytes of the latter.

Under autocast every step casts every matrix to bfloat16, and every gradient back: 12 bytes a parameter that compute
nothing, and take a quarter as long as the matrix products on a CPU. Here the model holds the matrices in bfloat16 and
their gradients are bfloat16. What the float32 weight, the master, has beyond them is kept in another 16 bits, so that
no byte is there twice; the optimiser joins and splits the two in its one pass (`fastmum.kernels.halves`).

With one backward pass a step the numbers are those of autocast, with its rounding done once, but for exact ties: one
value of 131,072 is rounded away from zero where autocast rounds to even. Masters lose nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmum.kernels.halves import Halves

PRODUCTS = (nn.Linear, nn.Conv2d)  # modules whose weights and biases autocast casts


class Weight(NamedTuple):
    """One weight of a model.

    Args:
        name: in the model's `state_dict`.
        parameter: that the model computes with.
        rest: int16, what the master has beyond a bfloat16 parameter; None where the parameter is the master.
    """

    name: str
    parameter: nn.Parameter
    rest: Tensor | None

    @property
    def stored(self) -> Tensor | Halves:
        """What is learnt, as it lies in memory: a float32 tensor or its halves."""
        parameter = self.parameter.detach()
        return parameter if self.rest is None else Halves(parameter, self.rest)

    @property
    def master(self) -> Tensor:
        """What is learnt, float32: the parameter itself, or joined in new memory."""
        return self.stored.join() if self.rest is not None else self.parameter.detach()


class MasterWeights:
    """The float32 weights of a model, of which it computes with those in `dtype`.

    Args:
        model: its matrices and their biases become `dtype`; everything else stays as it is.
        dtype: torch.bfloat16, or torch.float32 for a model that stays as it is, such as one that FSDP shares out: its
            bfloat16 weights are made when they are gathered.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        rests: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, PRODUCTS):
                for key, p in module.named_parameters(prefix=name, recurse=False):
                    if p.dtype != dtype:
                        p.data, rests[key] = Halves.of(p.detach())
        self.weights = [Weight(name, p, rests.get(name)) for name, p in model.named_parameters()]
        model.register_load_state_dict_post_hook(self._clear_rests)

    def _clear_rests(self, model: nn.Module, _incompatible: object) -> None:
        """Weights that were loaded behind our back have none."""
        for weight in self.weights:
            if weight.rest is not None:
                weight.rest.zero_()
