"""Operators and host functions that cost little Python time per call.

`torch.library.custom_op` calls a dozen Python functions around each operator; `operator` registers the host function
itself. `planned` runs a host function once per kind of arguments and keeps what it did: the allocations and launches,
with grids, constants and compiled kernels. Later calls repeat these and compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce, wraps
from operator import attrgetter, itemgetter, methodcaller, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from fastmum.kernels import dispatch

LIBRARY = torch.library.Library("fastmum", "FRAGMENT")
HOSTS: dict[str, Callable] = {}  # host function of every operator, by its full name
PLANS: list[dict] = []  # of every planned function
MOST_PLANS = 1024  # of a function, which batches of many shapes could exceed


def operator(name: str) -> Callable[[Callable], OpOverload]:
    """Register a function of tensors and numbers, which changes none of its arguments, as `fastmum::<name>`.

    It needs a `torch.library.register_fake`; and for gradients a `register_autograd`, which costs a few microseconds,
    or an autograd function around it.
    """

    def register(function: Callable) -> OpOverload:
        full = f"fastmum::{name}"
        schema = torch.library.infer_schema(function, mutates_args=(), op_name=name)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        HOSTS[full] = function
        return getattr(torch.ops.fastmum, name).default

    return register


class _Tape:
    """Allocations and launches of a call: kernel, grid, arguments, options, and what the launch returned."""

    def __init__(self) -> None:
        self.created: list[Tensor] = []
        self.launches: list[tuple[Callable, tuple[int, ...], tuple, dict[str, object], Any]] = []


class _Plan(NamedTuple):
    """A call's allocations and launches.

    Arguments of launches and results are chosen from (tensors of the call, created tensors, stream, constants).
    """

    device: int  # -1: the CPU
    create: list[Callable[[], Tensor]]
    constants: tuple
    launches: list[tuple[Callable, itemgetter]]
    result: Callable[[tuple], Any]


def planned(function: Callable) -> Callable:
    """Decorate a host function so that calls with arguments of the same kind repeat what the first one did.

    The function allocates by `dispatch.empty`, launches by `dispatch.launch`, and returns None, a tensor or a tuple of
    tensors and None. It may depend on the shapes, strides, dtypes and device of its arguments, and on the values of
    those that are no tensors. Calls are not planned if it computes anything else, such as a contiguous copy, or if
    memory is not aligned to 16 bytes, for which Triton compiles other kernels.
    """
    plans: dict[tuple, _Plan | None] = {}
    choosers: dict[tuple, tuple[itemgetter, itemgetter]] = {}  # of tensors and of other arguments, by types
    PLANS.append(plans)

    # Loops in C: this runs at every call.
    @wraps(function)
    def call(*args: Any) -> Any:
        types = (*map(type, args),)
        choose = choosers.get(types)
        if choose is None:
            choose = choosers[types] = _choosers(types)
        tensors = choose[0](args)
        if (
            dispatch.recorder is not None
            or getattr(dispatch.recording, "tape", None)
            or reduce(or_, map(_address, tensors)) & 15
        ):
            return function(*args)
        key = types, choose[1](args), *map(_layout, tensors), *map(_strides, tensors)
        try:
            plan = plans[key]
        except KeyError:
            return _record(function, args, tensors, plans, key)
        return function(*args) if plan is None else _repeat(plan, tensors)

    return call


_layout, _strides, _address = attrgetter("shape", "dtype", "device"), methodcaller("stride"), methodcaller("data_ptr")


def _choosers(types: tuple) -> tuple[itemgetter, itemgetter]:
    places: tuple[list, list] = [], []
    for i, kind in enumerate(types):
        places[not issubclass(kind, Tensor)].append(i)
    tensors, others = map(chooser, places)
    return tensors, others


def chooser(places: Sequence[int]) -> itemgetter:
    """Items of a sequence at these places, a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))  # of one place, not the item itself


def reset() -> None:
    """Forget all plans and choices, after a change of the environment."""
    dispatch.choices.clear()
    for plans in PLANS:
        plans.clear()


def _repeat(plan: _Plan, tensors: Sequence[Tensor]) -> Any:
    if plan.device >= 0 and plan.device != torch._C._cuda_getDevice():
        with torch.cuda.device(plan.device):
            return _repeat(plan, tensors)
    created = [create() for create in plan.create]
    stream = torch._C._cuda_getCurrentRawStream(plan.device) if plan.device >= 0 else None
    pool = (*tensors, *created, stream, *plan.constants)
    for run, choose in plan.launches:
        run(*choose(pool))
    return plan.result(pool)


def _record(function: Callable, args: tuple, tensors: tuple[Tensor, ...], plans: dict, key: tuple) -> Any:
    dispatch.recording.tape = tape = _Tape()
    try:
        result = function(*args)
    finally:
        dispatch.recording.tape = None
    if len(plans) >= MOST_PLANS:
        plans.clear()
    if len({id(x) for x in tensors}) == len(tensors):  # else the plan would not tell them apart
        plans[key] = _plan(tape, tensors, result)
    return result


def _plan(tape: _Tape, tensors: Sequence[Tensor], result: Any) -> _Plan | None:
    """None if a launch or the result has a tensor that is neither an argument nor was created."""
    pool: list[Any] = [*tensors, *tape.created, None]
    places = {id(x): i for i, x in reversed(list(enumerate(pool[:-1])))}
    stream = len(pool) - 1

    def place(x: Any) -> int:
        """Index in the pool; constants are added to it."""
        if isinstance(x, Tensor):
            return places[id(x)]
        pool.append(x)
        return len(pool) - 1

    try:
        launches: list[tuple[Callable, itemgetter]] = []
        for kernel, grid, values, options, compiled in tape.launches:
            if compiled is None:  # interpreted
                run, chosen = partial(kernel[grid], **options), [place(x) for x in values]  # type: ignore[index]
            else:
                given = dict(zip(kernel.arg_names, values, strict=False)) | options  # type: ignore[attr-defined]
                head = *grid, *(1,) * (3 - len(grid))
                function = compiled.function, compiled.packed_metadata, None, None, None  # no hooks
                chosen = [*map(place, head), stream, *map(place, function)]
                chosen += [place(given[name]) for name in kernel.arg_names]  # type: ignore[attr-defined]
                run = compiled.run
            launches.append((run, itemgetter(*chosen)))
        if result is None or isinstance(result, Tensor):
            finish: Callable = itemgetter(place(result))
        else:
            several = itemgetter(*[place(x) for x in result])
            finish = several if len(result) > 1 else lambda pool: (several(pool),)
    except KeyError:
        return None
    device = tensors[0].get_device()
    create: list[Callable] = [partial(torch.empty, x.shape, dtype=x.dtype, device=x.device) for x in tape.created]
    return _Plan(device, create, tuple(pool[stream + 1 :]), launches, finish)
