"""What a backend of ragged attention is."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastmum.attention.spans import Spans

HALF = (torch.bfloat16, torch.float16)  # what FlashAttention's kernels compute in
P, R = ParamSpec("P"), TypeVar("R")
Plan = object  # what a backend makes of spans: spans on its device, a mask, ...


class AttentionError(RuntimeError):
    """A backend that cannot be used here; the message is one line for the user."""


def constant_in_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """What `torch.compiler.assume_constant_result` does, without its import of the compiler, which takes seconds."""
    function._dynamo_marked_constant = True
    return function


def is_installed(package: str) -> bool:
    """Whether there is a module of that name.

    Raises:
        ImportError: the parent of a dotted name is there and cannot be imported.
    """
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # no parent
        return False


class Backend(ABC):
    """One way to compute ragged attention.

    A plan is made once a batch, outside compiled code; attention itself then has no Python that depends on data.

    Args:
        name: as in `model.attention`.
        package: module that it needs, or None.
        install: how to get it.
        dtypes: that its kernels compute in, None for all.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None
    package: ClassVar[str | None] = None
    install: ClassVar[str] = ""

    def why_not(self, device: torch.device) -> str | None:
        """Why this backend cannot run on `device`, with the remedy; None where it can."""
        if device.type != "cuda":
            return f"it needs a CUDA device, and this is '{device.type}'"
        return self.why_no_package()

    def why_no_package(self) -> str | None:
        """Why its package cannot be used, None where it can; nothing is imported but the parents of a dotted name."""
        if self.package is None:
            return None
        try:
            found = is_installed(self.package)
        except ImportError as error:  # built for another torch or CUDA
            return f"the package '{self.package}' is installed but cannot be imported ({error}): {self.install}"
        return None if found else f"the package '{self.package}' is not installed: {self.install}"

    def why_not_dtype(self, dtype: torch.dtype) -> str | None:
        """Why this backend cannot compute in `dtype`, None where it can."""
        if self.dtypes is None or dtype in self.dtypes:
            return None
        return f"it computes in bfloat16 and float16, and this is {str(dtype).removeprefix('torch.')}"

    def plan(self, spans: Spans, device: torch.device) -> Plan:
        """What `attend` needs to know about the spans."""
        return spans.to(device)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """Attention of queries (T_q, h, d) to keys and values (T_k, h, d) of their span -> (T_q, h, d)."""
