"""Gradients of a step: summed over its batches and over devices, in float32, while the backward pass goes on.

Weights that every device has whole are summed here. Their gradients go into flat buckets in the order in which the
backward pass makes them, and a bucket that is full is sent while the layers below are computed; what is compiled block
by block keeps this overlap. Weights that are shared out (`shard`) arrive summed, by FSDP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastmum.engine.distributed import DistContext
from fastmum.kernels import total_norm

# Values of a bucket: enough for full bandwidth, few enough that the last one, which nothing hides, is short.
BUCKET = {"cpu": 1 << 21, "cuda": 1 << 24}


def local(tensor: Tensor) -> Tensor:
    """This device's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Gradients:
    """Where the gradients of a model's parameters are.

    A single device with a single batch a step leaves them with the parameters, in their dtype. Otherwise they are
    summed in float32; what is sent is `reduce_dtype`. Sums are not averaged: the loss of each batch was scaled by its
    share of the step beforehand.

    Args:
        parameters: of the model, in the order of the forward pass; those that are DTensors are summed by FSDP.
        world: of the processes.
        batches: of a step on this process.
        reduce_dtype: torch.float32 or torch.bfloat16.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        world: DistContext,
        batches: int = 1,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._parameters = list(parameters)
        whole = [p for p in self._parameters if not isinstance(p, DTensor)]
        self._buckets: list[_Bucket] = []
        if world.size > 1 or batches > 1:
            sent_as = reduce_dtype if world.size > 1 else None
            self._buckets = [_Bucket(some, sent_as) for some in _split(whole[::-1], world.device)]
        self._views = {p: view for bucket in self._buckets for p, view in bucket.views.items()}
        self._last = True
        for bucket in self._buckets:
            for parameter in bucket.views:
                parameter.register_post_accumulate_grad_hook(self._take(bucket))

    def next_batch(self, last: bool) -> None:
        """Say before each backward pass whether it is the step's last one, after which sums are complete."""
        self._last = last

    def finish(self) -> None:
        """Wait, on the device, for what is under way; after the last backward pass. Sums are then complete."""
        self._send()
        for bucket in self._buckets:
            bucket.finish()

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """This device's part of the sum, None where nothing flowed into it."""
        if parameter in self._views:
            return self._views[parameter]
        return None if parameter.grad is None else local(parameter.grad)

    def norm(self) -> Tensor:
        """The 2-norm of all gradients of the step, 0-d float32 on the device, the same on every one."""
        whole = [bucket.sum for bucket in self._buckets]
        parts = []
        for p in self._parameters:
            if p.grad is not None:
                (parts if isinstance(p, DTensor) else whole).append(local(p.grad))
        norm = total_norm(whole)
        if parts:
            # Devices of one group have different parts; groups have the same.
            squares = total_norm(parts).square_()
            dist.all_reduce(squares, group=_shard_group(self._parameters))
            norm = (norm.square() + squares).sqrt()
        return norm

    def clear(self) -> None:
        """Forget the gradients of the step."""
        for p in self._parameters:
            p.grad = None
        for bucket in self._buckets:
            bucket.clear()

    def _take(self, bucket: _Bucket) -> Callable[[nn.Parameter], None]:
        def hook(parameter: nn.Parameter) -> None:
            bucket.add(parameter)
            if self._last:
                bucket.missing -= 1
                self._send(full_only=True)

        return hook

    def _send(self, full_only: bool = False) -> None:
        # In the same order on all devices, whatever the order in which buckets fill up.
        for bucket in self._buckets:
            if full_only and bucket.missing > 0:
                break
            bucket.send()


class _Bucket:
    """Sums of the gradients of some parameters, side by side.

    Args:
        parameters: whole on every device.
        sent_as: dtype in which devices are summed; None: there is one device.
    """

    def __init__(self, parameters: list[nn.Parameter], sent_as: torch.dtype | None) -> None:
        device = parameters[0].device
        self.sum = torch.zeros(sum(p.numel() for p in parameters), device=device)
        self.views: dict[nn.Parameter, Tensor] = {}
        self._sent_as = sent_as
        self._work: dist.Work | None = None
        self._wire: Tensor | None = None
        start = 0
        for p in parameters:
            # In the layout of its parameter, so that the optimiser passes over both in the order of memory.
            self.views[p] = torch.as_strided(self.sum, p.shape, p.stride(), start)
            start += p.numel()
        self.clear()

    def clear(self) -> None:
        self.missing = len(self.views)
        self._empty = set(self.views)
        self._sent = False

    def add(self, parameter: nn.Parameter) -> None:
        view = self.views[parameter]
        if parameter in self._empty:
            view.copy_(parameter.grad)
            self._empty.discard(parameter)
        else:
            view.add_(parameter.grad)
        parameter.grad = None

    def send(self) -> None:
        if self._sent:
            return
        self._sent = True
        for parameter in self._empty:  # nothing flowed into it
            self.views[parameter].zero_()
        if self._sent_as is not None:
            self._wire = self.sum.to(self._sent_as)
            self._work = dist.all_reduce(self._wire, async_op=True)

    def finish(self) -> None:
        if self._work is not None:
            self._work.wait()
            if self._wire is not self.sum:
                self.sum.copy_(self._wire)
            self._work = self._wire = None


def _split(parameters: list[nn.Parameter], device: torch.device) -> Iterator[list[nn.Parameter]]:
    limit, some, size = BUCKET.get(device.type, BUCKET["cuda"]), [], 0
    for p in parameters:
        if some and size + p.numel() > limit:
            yield some
            some, size = [], 0
        some.append(p)
        size += p.numel()
    if some:
        yield some


def _shard_group(parameters: list[nn.Parameter]) -> dist.ProcessGroup:
    """The devices that have the parts of one copy."""
    mesh = next(p.device_mesh for p in parameters if isinstance(p, DTensor))
    return mesh.get_group(mesh.ndim - 1)
