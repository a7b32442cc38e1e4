"""Gradients of a step: summed over micro-batches and devices in float32, while the backward pass runs.

Replicated weights are reduced here. Flat buckets collect their gradients in the order of the backward pass, and a full
bucket is all-reduced while earlier layers are computed. FSDP reduces sharded weights (`shard`). Frozen parameters have
no hook and no place in a bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastmum.engine.distributed import DistContext
from fastmum.engine.task import ParamGroup
from fastmum.kernels.total_norm import Norm

# Elements of a bucket: enough for full bandwidth, few enough that the last all-reduce, which nothing hides, is short.
BUCKET = {"cpu": 1 << 21, "cuda": 1 << 24}


def local(tensor: Tensor) -> Tensor:
    """The local shard of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Gradients:
    """Gradients of a model's trainable parameters.

    A single device with one micro-batch per step leaves them in `parameter.grad`, in the parameter's dtype. Otherwise
    they are summed in float32 and sent in `reduce_dtype`. They are sums, not means.

    Args:
        groups: parameters in the order of the forward pass; DTensors are reduced by FSDP.
        batches: micro-batches per step on this process.
    """

    def __init__(
        self, groups: Sequence[ParamGroup], world: DistContext, batches: int = 1,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self._groups = [list(group.parameters) for group in groups]
        self._norms = [(Norm(), Norm()) for _ in groups]  # of replicated and sharded gradients
        self._buckets: list[list[_Bucket]] = [[] for _ in groups]
        if world.size > 1 or batches > 1:
            sent_as = reduce_dtype if world.size > 1 else None
            for buckets, parameters in zip(self._buckets, self._groups, strict=True):
                replicated = [p for p in parameters if not isinstance(p, DTensor)]
                buckets += [_Bucket(some, sent_as) for some in _split(replicated[::-1], world.device)]
        self._all_buckets = [bucket for buckets in self._buckets for bucket in buckets]
        self._views = {p: view for bucket in self._all_buckets for p, view in bucket.views.items()}
        self._last = True
        for bucket in self._all_buckets:
            for parameter in bucket.views:
                parameter.register_post_accumulate_grad_hook(self._take(bucket))

    def next_batch(self, last: bool) -> None:
        """Announce a backward pass; after the step's last one the sums are complete."""
        self._last = last

    def finish(self) -> None:
        """Send what was not sent, and make the device wait for the reductions. Call after the last backward pass."""
        self._send()
        for bucket in self._all_buckets:
            bucket.finish()

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """The local shard of the sum; None if the parameter got no gradient."""
        if self._views and parameter in self._views:
            return self._views[parameter]
        grad = parameter.grad
        return grad.to_local() if isinstance(grad, DTensor) else grad

    def without_gradient(self) -> list[nn.Parameter]:
        """Parameters without a gradient on this process; call it between `finish` and `clear`."""
        others = (p for parameters in self._groups for p in parameters if p not in self._views)
        return [*(p for bucket in self._all_buckets for p in bucket.empty), *(p for p in others if p.grad is None)]

    def norms(self) -> list[Tensor]:
        """The 2-norm of each group's gradient, 0-d float32 on the device, the same on every device."""
        norms, sharded = [], []
        for parameters, buckets, (norm, _) in zip(self._groups, self._buckets, self._norms, strict=True):
            grads = [p.grad for p in parameters if p.grad is not None]
            norms.append(norm([b.sum for b in buckets] + [g for g in grads if not isinstance(g, DTensor)]))
            sharded.append([g.to_local() for g in grads if isinstance(g, DTensor)])
        if any(sharded):
            # The devices of a shard group have different shards; replicas have the same.
            device = next(grad.device for some in sharded for grad in some)
            squares = torch.stack([norm(some).to(device) for some, (_, norm) in zip(sharded, self._norms, strict=True)])
            squares = squares.square()
            mesh = next(p.device_mesh for group in self._groups for p in group if isinstance(p, DTensor))
            dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
            norms = [(norm.square() + square).sqrt() for norm, square in zip(norms, squares, strict=True)]
        return norms

    @torch.no_grad()
    def scale_(self, factors: Sequence[Tensor | None]) -> None:
        """Multiply the gradient of each group by a 0-d float32 tensor; None leaves it as it is."""
        for parameters, buckets, factor in zip(self._groups, self._buckets, factors, strict=True):
            if factor is None:
                continue
            for bucket in buckets:
                bucket.sum.mul_(factor)
            for p in parameters:
                if p.grad is not None:
                    local(p.grad).mul_(factor)

    def clear(self) -> None:
        """Forget the gradients of the step."""
        for parameters in self._groups:
            for p in parameters:
                p.grad = None
        for bucket in self._all_buckets:
            bucket.clear()

    def _take(self, bucket: _Bucket) -> Callable[[nn.Parameter], None]:
        def hook(parameter: nn.Parameter) -> None:
            bucket.add(parameter)
            if self._last:
                bucket.missing -= 1
                self._send(full_only=True)

        return hook

    def _send(self, full_only: bool = False) -> None:
        # In the same order on all devices, in whatever order buckets fill up.
        for bucket in self._all_buckets:
            if full_only and bucket.missing > 0:
                break
            bucket.send()


class _Bucket:
    """Flat float32 sum of the gradients of replicated parameters, in the order of the backward pass.

    `sent_as` is the dtype of the all-reduce, None on a single device.
    """

    def __init__(self, parameters: list[nn.Parameter], sent_as: torch.dtype | None) -> None:
        device = parameters[0].device
        sizes = [p.numel() for p in parameters]
        self.sum = torch.zeros(sum(sizes), device=device)
        # In the layout of the parameter, so that the optimizer reads both in memory order.
        flat = zip(parameters, self.sum.split(sizes), strict=True)
        self.views = {p: part.as_strided(p.shape, p.stride(), part.storage_offset()) for p, part in flat}
        self._sent_as = sent_as
        self._work: dist.Work | None = None
        self._wire = self.sum
        self.clear()

    def clear(self) -> None:
        self.missing = len(self.views)
        self.empty = set(self.views)  # those without a gradient so far
        self._sent = False

    def add(self, parameter: nn.Parameter) -> None:
        view, grad = self.views[parameter], parameter.grad
        assert grad is not None
        if parameter in self.empty:
            view.copy_(grad)
            self.empty.discard(parameter)
        else:
            view.add_(grad)
        parameter.grad = None

    def send(self) -> None:
        if self._sent:
            return
        self._sent = True
        for parameter in self.empty:  # got no gradient
            self.views[parameter].zero_()
        if self._sent_as is not None:
            self._wire = self.sum.to(self._sent_as)
            self._work = dist.all_reduce(self._wire, async_op=True)

    def finish(self) -> None:
        if self._work is not None:
            self._work.wait()
            if self._wire is not self.sum:
                self.sum.copy_(self._wire)
            self._work, self._wire = None, self.sum


def _split(parameters: list[nn.Parameter], device: torch.device) -> Iterator[list[nn.Parameter]]:
    limit, size = BUCKET.get(device.type, BUCKET["cuda"]), 0
    some: list[nn.Parameter] = []
    for p in parameters:
        if some and size + p.numel() > limit:
            yield some
            some, size = [], 0
        some.append(p)
        size += p.numel()
    if some:
        yield some
