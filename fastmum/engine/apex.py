"""FusedAdam of NVIDIA's Apex in the place of torch's fused AdamW (`optim.optimizer=apex`)."""

import importlib
import sys
from types import SimpleNamespace

import torch
from torch import Tensor

from fastmum.config.schema import ConfigError, OptimSection
from fastmum.engine.gradients import local
from fastmum.engine.optimizer import GradientOf, Optimizer, Weight, own_gradient

INSTALL = "build it with its CUDA extensions from https://github.com/NVIDIA/apex, or take optim.optimizer=adamw"
NEEDED = "cuda"  # type of the device


def find_fused_adam() -> type:
    """Apex's class; ConfigError if it is not installed, or is the unrelated project of that name on PyPI."""
    key = "optim.optimizer is apex, but"
    try:
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "apex":
            raise ConfigError(f"{key} NVIDIA's Apex is not installed: {INSTALL}") from None
        where = getattr(sys.modules.get("apex"), "__file__", None) or "on the path"
        raise ConfigError(
            f"{key} the package 'apex' found here ({where}) is not NVIDIA's: it has no apex.optimizers.FusedAdam "
            f"({error}); 'pip install apex' installs an unrelated project, so 'pip uninstall apex' and {INSTALL}"
        ) from None


class ApexAdamW(Optimizer):
    """AdamW by the class `fused_adam` in its capturable form, which reads rate and found_inf on the device.

    ConfigError: Apex has no CUDA extensions, or the model is not on a GPU.
    """

    def __init__(self, weights: list[Weight], optim: OptimSection, fused_adam: type) -> None:
        super().__init__(weights, optim)
        if self.steps.device.type != NEEDED:
            raise ConfigError("optim.optimizer is apex, which needs a CUDA device: take optim.optimizer=adamw")
        # Apex needs float32 weights: halves are joined during an update only.
        self._parts = [self.steps.new_empty(0) if w.rest is not None else local(w.master) for w in self.weights]
        of_group = [(w.weight_decay, w.lr_scale) for w in self.weights]
        self._kinds = sorted(set(of_group))
        parts = [[p for p, own in zip(self._parts, of_group, strict=True) if own == kind] for kind in self._kinds]
        groups = [{"params": some, "weight_decay": kind[0]} for some, kind in zip(parts, self._kinds, strict=True)]
        try:
            betas = tuple(optim.betas)
            self._apex = fused_adam(groups, lr=0.0, betas=betas, eps=optim.eps, adam_w_mode=True, capturable=True)
        except RuntimeError as error:
            raise ConfigError(f"optim.optimizer is apex, but it cannot be used ({error}): {INSTALL}") from None
        for group in self._apex.param_groups:
            group["lr"] = group["lr"].clone()  # groups may share it
        for part, weight in zip(self._parts, self.weights, strict=True):
            averages = (local(moment) for moment in self.moments[weight.name])
            self._apex.state[part] = dict(zip(("exp_avg", "exp_avg_sq"), averages, strict=True))

    @torch.no_grad()
    def step(self, rate: float, gradient: GradientOf = own_gradient, found_inf: Tensor | None = None) -> None:
        found_inf = torch.zeros_like(self.steps) if found_inf is None else found_inf
        for part, weight in zip(self._parts, self.weights, strict=True):
            if weight.rest is not None:
                part.data = weight.master
            grad = gradient(weight.parameter)
            part.grad = None if grad is None else grad.float()
        for (_, lr_scale), group in zip(self._kinds, self._apex.param_groups, strict=True):
            group["lr"].fill_(rate * lr_scale)
            group["step"] = self.steps.to(torch.int32).reshape(1)  # Apex adds 1
        self._apex._dummy_overflow_buf.zero_()  # else it does not add after a skipped step
        flag = found_inf.reshape(1)  # in a gradient scaler with the two methods that Apex calls, and a scale of 1
        scaler = SimpleNamespace(
            _check_inf_per_device=lambda _: {flag.device: flag}, _get_scale_async=lambda: torch.ones_like(flag)
        )
        self._apex.step(grad_scaler=scaler)
        self.steps += 1 - found_inf
        for part, weight in zip(self._parts, self.weights, strict=True):
            part.grad = None
            if weight.rest is not None:
                weight.stored.fill_(part)
                part.data = self.steps.new_empty(0)
