"""Records all kernels that Python code would launch, as it runs on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.launches import Launch, recorded_launches
from benchmarks.offline.kernel import Kernel
from benchmarks.offline.operators import ATTENTION_OPS, kernel_of_launch, kernels_of, nbytes, tensors_of
from fastmum.kernels.plans import HOSTS

# Operators whose kernels take their tensors by address.
BY_ADDRESS = {"fastmum::adamw_", "fastmum::apply_", "fastmum::momentum_", "fastmum::total_norm"}


class Recorder(TorchDispatchMode):
    """Records kernels, and the memory of live tensors that were created under it.

    Tensors are freed as Python and autograd free them, so `peak` is eager PyTorch's without its allocator's
    rounding.

    Args:
        arch: compute capability.
        sequences: equal segments of ragged attention.
    """

    def __init__(self, arch: int, sequences: int) -> None:
        super().__init__()
        self.arch, self.sequences = arch, sequences
        self.kernels: list[Kernel] = []
        self.launches: list[Launch] = []  # of our kernels, each kind once
        self.live = self.peak = 0
        self._kind: str | None = None
        self._alive: dict[int, int] = {}
        self._known: dict[object, list[Kernel]] = {}

    def __torch_dispatch__(
        self, op: OpOverload, types: object, args: Sequence = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        self._hold(out)
        if op.namespace == "fastmum" and op._schema.name not in ATTENTION_OPS:
            self.record(self._of_fastmum(op, args, kwargs))
        else:
            self.record(kernels_of(op, args, kwargs, out, self.sequences))
        return out

    def record(self, kernels: Sequence[Kernel]) -> None:
        """Record kernels, in the class of `counted_as` if there is one."""
        self.kernels += kernels if self._kind is None else [k._replace(kind=self._kind) for k in kernels]

    @contextmanager
    def counted_as(self, kind: str) -> Iterator[None]:
        """Within it all kernels are of one class."""
        self._kind, before = kind, self._kind
        try:
            yield
        finally:
            self._kind = before

    def restart(self) -> None:
        """Forget kernels and the peak, but not live tensors."""
        self.kernels, self.peak = [], self.live

    def lived_with(self, transient: int) -> None:
        """Account for memory that was in use temporarily, in bytes."""
        self.peak = max(self.peak, self.live + transient)

    def _hold(self, out: object) -> None:
        for x in tensors_of(out):
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self._alive and x.device.type != "meta":
                self._alive[key] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._let_go, key)
        self.peak = max(self.peak, self.live)

    def _let_go(self, key: int) -> None:
        self.live -= self._alive.pop(key)

    def _of_fastmum(self, op: OpOverload, args: Sequence, kwargs: dict) -> list[Kernel]:
        """The launches of the host wrapper, which runs without data."""
        key = (op, repr(pytree.tree_map_only(Tensor, _signature, (args, kwargs))))
        if key not in self._known:
            with unset_fake_temporarily(), recorded_launches(self.arch) as launches:
                # PyTorch operators around the kernels are recorded, too.
                around = Recorder(self.arch, self.sequences)
                meta_args, meta_kwargs = _meta((args, kwargs))
                with around:
                    name = op._schema.name
                    host = HOSTS[name] if name in HOSTS else OPDEFS[name]._init_fn
                    host(*meta_args, **meta_kwargs)
            self.launches += launches
            kernels = [kernel_of_launch(launch) for launch in launches]
            if op._schema.name in BY_ADDRESS:
                moved = sum(_accesses(argument) * sum(map(nbytes, value)) for argument, value in _lists(op, args))
                kernels = [kernel._replace(moved=moved // len(kernels)) for kernel in kernels]
            self._known[key] = [*kernels, *around.kernels]
        return self._known[key]


def _lists(op: OpOverload, args: Sequence) -> list[tuple[torch._C.Argument, list[Tensor]]]:
    """Arguments that are lists of tensors."""
    given = zip(op._schema.arguments, args, strict=False)
    return [(a, value) for a, value in given if isinstance(value, list) and all(isinstance(x, Tensor) for x in value)]


def _accesses(argument: torch._C.Argument) -> int:
    """2 if it is read and written; Muon's momentum only writes its `updates`."""
    return 1 + (argument.is_write and argument.name != "updates")


def _signature(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} {x.stride()}"


def _meta(tree: object) -> tuple:
    """The same arguments without memory; the same tensor stays the same."""
    made: dict[int, Tensor] = {}

    def convert(x: Tensor) -> Tensor:
        if id(x) not in made:
            made[id(x)] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return made[id(x)]

    return pytree.tree_map_only(Tensor, convert, tree)
