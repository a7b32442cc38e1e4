"""The base of attention backends: segments, the interface, and a custom operator that the compiler does not trace.

The operator reads the lengths on the CPU: they may vary without a graph break, a recompilation or a synchronisation.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from fastmum.errors import FastmumError

HALF = (torch.bfloat16, torch.float16)  # dtypes of the FlashAttention kernels


class AttentionError(FastmumError):
    """A backend that cannot be used."""


class Segments(NamedTuple):
    """Segments of packed queries, and the segment of keys that each attends to; segments may be empty."""

    cu_seqlens_q: Tensor  # (n + 1,) int32 cumulative lengths, 0, L_0, L_0 + L_1, ..., T
    cu_seqlens_k: Tensor
    max_seqlen_q: int  # upper bound of the lengths; the same for every batch where code is compiled
    max_seqlen_k: int
    # (3,) int32 on the CPU: number of segments, the first ones, that are not empty; their longest queries and keys.
    # None: unknown, or lengths are constant because CUDA graphs record them.
    sizes: Tensor | None = None

    @classmethod
    def of_frames(cls, lengths: Tensor | Sequence[int], num_frames: int, queries: int, keys: int, longest: int) -> Self:
        """Segments of sequences with `lengths` frames (n,), at most `longest`, of `queries` and `keys` tokens.

        On the CPU. Empty segments are appended up to `num_frames`, so that the shape does not depend on n.
        """
        lengths = torch.as_tensor(lengths)
        cu_frames = torch.full((num_frames + 1,), num_frames, dtype=torch.int32)
        cu_frames[0] = 0
        cu_frames[1 : len(lengths) + 1] = lengths.cumsum(0)
        n, most = lengths.count_nonzero(), lengths.amax()
        sizes = torch.stack([n, most * queries, most * keys]).int()
        return cls(cu_frames * queries, cu_frames * keys, longest * queries, longest * keys, sizes)

    def to(self, device: torch.device) -> Self:
        """Copy to a device: asynchronously to a GPU, synchronously to the CPU, where the lengths are read at once.

        `sizes` stay on the CPU.
        """
        cu_q, cu_k = (x.to(device, torch.int32, non_blocking=device.type != "cpu") for x in self[:2])
        return self._replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def ragged_lengths(frames: int, longest: int) -> list[int]:
    """Half of the remaining frames, again and again, at most `longest`: 96 -> 24, 24, 24, 12, 6, 3, 2, 1."""
    lengths: list[int] = []
    while rest := frames - sum(lengths):
        lengths.append(min(longest, (rest + 1) // 2))
    return lengths


def constant_in_graphs(function: Any) -> Any:
    """As `torch.compiler.assume_constant_result`, without its import of the compiler, which takes seconds."""
    function._dynamo_marked_constant = True
    return function


class Backend(ABC):
    """An implementation of ragged attention: a plan per batch, made outside compiled code, then `attend` per block."""

    name: ClassVar[str]  # value of `model.attention`
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None  # supported ones, None for all
    package: ClassVar[str | None] = None  # required module
    install: ClassVar[str] = ""  # how to get it

    @staticmethod
    def is_installed(package: str) -> bool:
        """Whether a module can be found; ImportError if its parent package fails to import."""
        try:
            return importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:  # the parent package is missing
            return False

    def why_not(self, device: torch.device) -> str | None:
        """Why the backend cannot run on `device`, with the remedy; None if it can."""
        if device.type != "cuda":
            return f"it needs a CUDA device, and this is '{device.type}'"
        try:
            if self.package is None or self.is_installed(self.package):
                return None
        except ImportError as error:  # built for another torch or CUDA
            return f"the package '{self.package}' is installed but cannot be imported ({error}): {self.install}"
        return f"the package '{self.package}' is not installed: {self.install}"

    def why_not_dtype(self, dtype: torch.dtype) -> str | None:
        """Why the backend cannot compute in `dtype`; None if it can."""
        if self.dtypes is None or dtype in self.dtypes:
            return None
        return f"it computes in bfloat16 and float16, and this is {str(dtype).removeprefix('torch.')}"

    def prepare(self, device: torch.device, dtype: torch.dtype, heads: int, width: int, segments: Segments) -> str:
        """Choose a kernel for batches such as `segments`, on the CPU; what will run, for the log."""
        return self.name

    def plan(self, segments: Segments, device: torch.device) -> Any:
        """The backend's form of `segments`, for `attend`."""
        return segments.to(device)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Any) -> Tensor:
        """Attention of queries (T_q, h, d) to the keys and values (T_k, h, d) of their segment -> (T_q, h, d)."""


class Group(NamedTuple):
    """Consecutive segments of equal lengths, computed together: n segments of Lq queries and Lk keys each."""

    n: int
    first_q: int
    first_k: int
    Lq: int
    Lk: int

    def queries(self, x: Tensor) -> Tensor:
        """Packed queries (T_q, h, d) -> a view of the group's, (n, h, Lq, d)."""
        return x.narrow(0, self.first_q, self.n * self.Lq).unflatten(0, (self.n, -1)).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """Packed keys or values (T_k, h, d) -> a view of the group's, (n, h, Lk, d)."""
        return x.narrow(0, self.first_k, self.n * self.Lk).unflatten(0, (self.n, -1)).transpose(1, 2)


def attention_operator(name: str, forward: Callable[..., Tensor], backward: Callable) -> Callable[..., Tensor]:
    """Register `fastmum::<name>` (q, k, v, cu_seqlens_q, cu_seqlens_k) -> out, cu_seqlens int32 on the CPU.

    `forward` (q, k, v, groups of non-empty segments) returns the output, contiguous, and `backward` (output gradient,
    q, k, v, groups) the gradients of q, k and v.
    """

    @torch.library.custom_op(f"fastmum::{name}", mutates_args=())
    def operator(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return forward(q, k, v, _groups(cu_q, cu_k, len(q), len(k)))

    @torch.library.custom_op(f"fastmum::{name}_backward", mutates_args=())
    def operator_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            return backward(grad, q, k, v, _groups(cu_q, cu_k, len(q), len(k)))

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *operator_backward(grad, *ctx.saved_tensors), None, None

    operator.register_fake(lambda q, *_: q.new_empty(q.shape))
    operator_backward.register_fake(lambda grad, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:3]))
    operator.register_autograd(differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return operator


def _groups(cu_q: Tensor, cu_k: Tensor, num_queries: int, num_keys: int) -> list[Group]:
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    if (ends_q[-1], ends_k[-1]) != (num_queries, num_keys):
        ends = f"segments end at {ends_q[-1]} and {ends_k[-1]}"
        raise ValueError(f"{ends}, but there are {num_queries} queries and {num_keys} keys")
    groups: list[Group] = []
    for (first_q, end_q), (first_k, end_k) in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
        new = Group(1, first_q, first_k, end_q - first_q, end_k - first_k)
        if not new.Lq or not new.Lk:
            continue
        n, before_q, before_k, Lq, Lk = groups[-1] if groups else new
        if groups and new[1:] == (before_q + n * Lq, before_k + n * Lk, Lq, Lk):
            groups[-1] = groups[-1]._replace(n=n + 1)
        else:
            groups.append(new)
    return groups
