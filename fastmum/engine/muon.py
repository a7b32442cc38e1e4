"""Muon: orthogonalised momentum for matrices, AdamW for the other weights (`optim.optimizer=muon`).

Jordan et al., "Muon: an optimizer for hidden layers" (2024); scale of the updates from Liu et al., "Muon is scalable
for LLM training" (2025). Processes share the work: each orthogonalises some matrices and sends them to the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastmum.config.schema import ConfigError, OptimSection
from fastmum.engine.distributed import DistContext
from fastmum.engine.gradients import local
from fastmum.engine.optimizer import AdamW, GradientOf, Weight, own_gradient
from fastmum.kernels.muon import NEWTON_SCHULZ, POLAR_EXPRESS, Coefficients, apply_, momentum_, orthogonalize

MOMENTUM = 0.95  # Nesterov's, of Jordan et al.
# Orthogonal matrices times 0.2 sqrt(max(rows, columns)) have the root mean square of AdamW's updates (Liu et al.).
RMS = 0.2
COEFFICIENTS: dict[str, Coefficients] = {"polar_express": POLAR_EXPRESS, "newton_schulz": NEWTON_SCHULZ}


class Muon(AdamW):
    """Muon for the weights with `matrices`, whose only moment is `exp_avg`; AdamW for the others.

    ConfigError: no weight has `matrices`, or they cannot be split into dense matrices of one dtype.

    Args:
        weights: all trainable weights; those with `matrices` are replicated, or sharded by rows (FSDP).
        dtype: of the products, torch.bfloat16 or torch.float32.
    """

    def __init__(self, weights: list[Weight], optim: OptimSection, world: DistContext, dtype: torch.dtype) -> None:
        super().__init__(weights, optim)
        matrices = [w for w in weights if w.matrices]
        if not matrices:
            raise ConfigError("optim.optimizer is muon, but the task names no matrices for it: take adamw")
        expected = matrices[0].parameter.dtype
        for name, p, n in ((w.name, w.parameter, w.matrices) for w in matrices):
            if p.ndim != 2 or len(p) % n or not local(p).is_contiguous() or p.dtype != expected:
                what = f"{name} {list(p.shape)} of {p.dtype}, for {n} dense matrices of {expected}"
                where = " outside of Task.exact" * (expected != torch.float32)
                raise ConfigError(f"optim.optimizer is muon, but a task gives {what}{where}")
        products = dtype, COEFFICIENTS[optim.orthogonalize]
        sharded = [_Unit(w) for w in matrices if isinstance(w.parameter, DTensor)]
        replicated = [_Unit(w, i) for w in matrices if not isinstance(w.parameter, DTensor) for i in range(w.matrices)]
        self.partitions: list[_Partition] = []
        if replicated:
            self.partitions.append(_Replicated(replicated, *products, world.rank, world.size, None))
        if sharded:
            mesh = cast(DTensor, sharded[0].weight.parameter).device_mesh
            group = mesh.get_group(mesh.ndim - 1)
            self.partitions.append(_Sharded(sharded, *products, group.rank(), group.size(), group))

    @torch.no_grad()
    def step(self, rate: float, gradient: GradientOf = own_gradient, found_inf: Tensor | None = None) -> None:
        for part in self.partitions:
            part.start(self.moments, gradient, found_inf)
        super().step(rate, gradient, found_inf)  # while matrices are sent
        for part in self.partitions:
            alike: dict[tuple, list[tuple[_Unit, Tensor]]] = defaultdict(list)
            for unit, update in part.finish():
                w = unit.weight
                alike[w.weight_decay, w.lr_scale, w.rest is None].append((unit, update))
            for (decay, lr_scale, whole), some in alike.items():
                apply_(
                    [unit.of(local(unit.weight.parameter.detach())) for unit, _ in some],
                    [] if whole else [unit.of(unit.weight.rest) for unit, _ in some], [update for _, update in some],
                    rate * lr_scale * self.optim.muon_lr_scale, [RMS * max(unit.shape) ** 0.5 for unit, _ in some],
                    decay, found_inf,
                )  # fmt: skip


class _Unit(NamedTuple):
    """What one process orthogonalises: matrix `part` of a weight, or all of them if `part` is None."""

    weight: Weight
    part: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of a matrix."""
        rows, columns = self.weight.parameter.shape
        return rows // self.weight.matrices, columns

    @property
    def matrices(self) -> int:
        return self.weight.matrices if self.part is None else 1

    @property
    def cost(self) -> int:
        """Operations of five steps of `orthogonalize` in half precision, where symmetric products compute one half.

        A wide matrix is multiplied once per two steps; the steps between use its Gram matrix.
        """
        small, large = sorted(self.shape)
        wide = large >= 2 * small
        return self.matrices * small * small * (9 * large + 17 * small if wide else 15 * large + 5 * small)

    def of(self, x: Tensor | None) -> Tensor:
        """The unit's rows of a tensor like the weight."""
        assert x is not None
        return x if self.part is None else x.chunk(self.weight.matrices)[self.part]


class _Partition(ABC):
    """Units divided among processes by cost, the largest first, to the least loaded; `owners`: the rank of each."""

    def __init__(
        self, units: Iterable[_Unit], dtype: torch.dtype, coefficients: Coefficients, rank: int, size: int,
        group: dist.ProcessGroup | None,
    ) -> None:  # fmt: skip
        self.dtype, self.coefficients, self.rank, self.size, self.group = dtype, coefficients, rank, size, group
        self.loads = [0] * size
        owners = {}
        for unit in sorted(units, key=lambda unit: unit.cost, reverse=True):
            owner = min(range(size), key=self.loads.__getitem__)
            self.loads[owner] += unit.cost
            owners[unit] = owner
        self.owners = dict(sorted(owners.items(), key=lambda item: item[1]))
        self.work: dist.Work | None = None
        self._updates: list[tuple[_Unit, Tensor]] = []

    def start(self, moments: Mapping[str, tuple[Tensor, ...]], gradient: GradientOf, found_inf: Tensor | None) -> None:
        """Update the momenta, orthogonalise the own matrices and begin to send them. All weights have gradients."""
        units = [*self.owners]
        averages = [unit.of(local(moments[unit.weight.name][0])) for unit in units]
        grads = [unit.of(gradient(unit.weight.parameter)) for unit in units]
        self._updates = list(zip(units, self.compute_updates(units, averages, grads, found_inf), strict=True))

    def finish(self) -> list[tuple[_Unit, Tensor]]:
        """Units and the local shards of their orthogonalised updates."""
        if self.work is not None:
            self.work.wait()
        updates, self.work, self._updates = self._updates, None, []
        return updates

    @abstractmethod
    def compute_updates(
        self, units: list[_Unit], averages: list[Tensor], grads: list[Tensor], found_inf: Tensor | None
    ) -> list[Tensor]:
        """The local shards of the updates, complete when `work` is."""


class _Replicated(_Partition):
    """Every process has whole gradients and momenta: an all-gather of the orthogonalised matrices."""

    def compute_updates(self, units, averages, grads, found_inf):
        owners = [self.owners[unit] for unit in units]
        sizes = [a.numel() for a in averages]
        longest = max(sum(n for n, o in zip(sizes, owners, strict=True) if o == rank) for rank in range(self.size))
        flat = torch.empty(self.size, longest, dtype=self.dtype, device=averages[0].device)
        updates, used = [], [0] * self.size
        for average, owner in zip(averages, owners, strict=True):
            updates.append(flat[owner].narrow(0, used[owner], average.numel()).view_as(average))
            used[owner] += average.numel()
        (own, *mine), (_, *others) = (
            [[x for x, o in zip(values, owners, strict=True) if (o == self.rank) == is_own]
             for values in (units, averages, grads, updates)]
            for is_own in (True, False)
        )  # fmt: skip
        momentum_(*mine, MOMENTUM, found_inf)
        momentum_(others[0], others[1], [], MOMENTUM, found_inf)
        _orthogonalize(own, mine[2], self.coefficients)
        if self.size > 1:
            own_part = flat[self.rank].clone()
            self.work = dist.all_gather_into_tensor(flat.view(-1), own_part, group=self.group, async_op=True)
        return updates


class _Sharded(_Partition):
    """Every process has rows of each gradient and momentum: an all-to-all to the owners, and one back."""

    def compute_updates(self, units, averages, grads, found_inf):
        own = [unit for unit in units if self.owners[unit] == self.rank]
        sent = [0] * self.size  # values for every owner
        for unit, average in zip(units, averages, strict=True):
            sent[self.owners[unit]] += average.numel()
        # Rows of own matrices on every process, and values from it.
        rows = [[_rows(len(unit.weight.parameter), rank, self.size) for unit in own] for rank in range(self.size)]
        received = [sum(n * unit.shape[1] for n, unit in zip(some, own, strict=True)) for some in rows]
        shards = torch.empty(sum(sent), dtype=self.dtype, device=averages[0].device)
        parts = shards.split([a.numel() for a in averages])
        updates = [part.view_as(average) for part, average in zip(parts, averages, strict=True)]
        momentum_(averages, grads, updates, MOMENTUM, found_inf)
        gathered = shards.new_empty(sum(received))
        dist.all_to_all_single(gathered, shards, received, sent, group=self.group)
        pieces = []  # of every process and own matrix
        for part, some in zip(gathered.split(received), rows, strict=True):
            values = part.split([n * unit.shape[1] for n, unit in zip(some, own, strict=True)])
            pieces.append([x.view(-1, unit.shape[1]) for x, unit in zip(values, own, strict=True)])
        matrices = [torch.cat(some) for some in zip(*pieces, strict=True)]
        _orthogonalize(own, matrices, self.coefficients)
        for of_matrix, counts, matrix in zip(zip(*pieces, strict=True), zip(*rows, strict=True), matrices, strict=True):
            torch._foreach_copy_(of_matrix, matrix.split(counts))
        self.work = dist.all_to_all_single(shards, gathered, sent, received, group=self.group, async_op=True)
        return updates


def _rows(rows: int, rank: int, size: int) -> int:
    """Rows of a tensor that FSDP leaves to a rank."""
    shard = -(-rows // size)
    return max(0, min(shard, rows - rank * shard))


def _orthogonalize(units: list[_Unit], updates: list[Tensor], coefficients: Coefficients) -> None:
    """Orthogonalise updates (n * rows, columns) in place, all of one shape together."""
    alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for unit, update in zip(units, updates, strict=True):
        for matrix in update.chunk(unit.matrices):
            matrix = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
            alike[matrix.shape].append(matrix)
    for some in alike.values():
        torch._foreach_copy_(some, list(orthogonalize(torch.stack(some), coefficients).unbind()))
