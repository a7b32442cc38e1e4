"""Operations and bytes of the kernels of an operator, by formula.

Bytes are those of every tensor that a kernel must read or write, once; gathers read what they select. Matrix products
and attention count two operations per multiply-add; attention has two products in the forward and five in the backward
pass. An operator is one launch, except layer norm's backward pass and operators on lists of tensors. Dense attention is
recorded as FlashAttention's operator, whichever kernel computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from benchmarks.launches import Launch
from benchmarks.offline.kernel import ATEN, COPIES, DENSE, LAYER_NORM, OURS, PRODUCTS, VARLEN, Kernel

aten = torch.ops.aten
PRODUCT_OPS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward}
# (number of products, arguments before q)
ATTENTION_OPS = {
    "aten::_scaled_dot_product_flash_attention": (2, 0),
    "aten::_scaled_dot_product_flash_attention_backward": (5, 1),
    "fastmum::varlen_attention": (2, 0),
    "fastmum::varlen_attention_backward": (5, 1),
}
COPY_OPS = {aten._to_copy, aten.clone, aten.copy_, aten.cat, aten.stack, aten.slice_backward, aten.repeat}
GATHER_OPS = {aten.gather, aten.index_select, aten.index}
WRITE_ONLY = {aten.copy_, aten.fill_, aten.zero_}  # they do not read their output
# Views and allocations.
NO_KERNEL = {"_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_KERNEL |= {"_local_scalar_dense", "lift_fresh", "_reshape_alias"}

# ATen/native/cuda/MultiTensorApply.cuh: tensors per launch by the number of lists, chunks per launch, values per chunk.
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CHUNKS_A_LAUNCH = 320
CHUNK = 65_536

FRAME = 512  # tokens: segments of at most so many are single frames
ROWS = 128  # of queries or keys that a thread block of FlashAttention 2 computes at width 64


def tensors_of(*trees: object) -> list[Tensor]:
    """All tensors in arguments or results."""
    return [x for x in pytree.tree_leaves(trees) if isinstance(x, Tensor)]


def nbytes(x: Tensor) -> int:
    """Bytes of distinct memory: an axis that repeats counts once."""
    return x.element_size() * prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or not n)


def kernels_of(op: OpOverload, args: Sequence, kwargs: dict, out: object, sequences: int) -> list[Kernel]:
    """Kernels of a call of an operator; none for views and allocations.

    Args:
        op: anything but fastmum's own, see `kernel_of_launch`.
        args, kwargs, out: of the call; tensors may be fake.
        sequences: equal segments of ragged attention.
    """
    packet, schema = op.overloadpacket, op._schema.name
    name = schema.split("::")[1]
    if op.is_view or name in NO_KERNEL or schema.startswith(("prim", "profiler")):
        return []
    if name.startswith(("_foreach_", "_fused_")):
        return _of_lists(name, op, args, kwargs, out)
    reads, writes = tensors_of(args, {key: x for key, x in kwargs.items() if key != "out"}), tensors_of(out)
    mutated = [args[i] for i, argument in enumerate(op._schema.arguments[: len(args)]) if argument.is_write]
    if packet in WRITE_ONLY:
        reads = [x for x in reads if x is not mutated[0]]
    moved = sum(map(nbytes, (*reads, *writes)))
    flops, kind = 0, COPIES if packet in COPY_OPS else LAYER_NORM if "layer_norm" in name else ATEN
    if packet in PRODUCT_OPS:
        kind, flops = PRODUCTS, flop_registry[packet](*args, **kwargs, out_val=out)
    elif schema in ATTENTION_OPS:
        return [_attention(schema, args, sequences, moved)]
    elif packet in GATHER_OPS:
        moved = 2 * sum(map(nbytes, writes)) + sum(map(nbytes, reads[1:]))
    elif packet is aten.scatter_add:
        moved = 3 * nbytes(args[3]) + nbytes(args[2])  # into memory that was cleared before
    elif packet is aten.native_layer_norm_backward:
        grad, x, grads = args[0], args[1], writes
        sums = sum(map(nbytes, grads[1:]))
        return [
            Kernel(name, kind, 0, moved - sums),
            Kernel(f"{name} (weight, bias)", kind, 0, nbytes(grad) + nbytes(x) + sums),
        ]
    return [Kernel(name, kind, flops, moved)]


def _attention(schema: str, args: Sequence, sequences: int, moved: int) -> Kernel:
    products, before = ATTENTION_OPS[schema]
    q, k = args[before : before + 2]
    way = "backward" if before else "forward"
    if q.ndim == 4:
        n, h, queries, d = q.shape
        how, keys, idle = DENSE, k.shape[2], 0
    else:
        total, h, d = q.shape
        n, how, queries, keys = sequences, VARLEN, total // sequences, len(k) // sequences
        segments, (longest_q, longest_k) = len(args[before + 3]) - 1, (x for x in args if isinstance(x, int))
        # The forward pass has one grid of queries, the backward pass two and one of keys.
        idle_q, idle_k = (
            h * (segments * -(-longest // ROWS) - n * -(-length // ROWS))
            for longest, length in ((longest_q, queries), (longest_k, keys))
        )
        idle = 2 * idle_q + idle_k if before else idle_q
    spans = "frames" if keys <= FRAME else "spans"
    return Kernel(schema, f"{how} {spans} {way}", products * 2 * n * h * queries * keys * d, moved, idle)


def _of_lists(name: str, op: OpOverload, args: Sequence, kwargs: dict, out: object) -> list[Kernel]:
    arguments = zip(op._schema.arguments, args, strict=False)
    given = [(a.is_write, value) for a, value in arguments if isinstance(value, (list, tuple))]
    lists = [(written, value) for written, value in given if value and isinstance(value[0], Tensor)]
    if name.startswith("_fused_"):  # it writes gradients only where it scales them, and steps are scalars
        lists = [(written and value is not args[1], value) for written, value in lists if value[0].ndim]
    first = lists[0][1]
    if first[0].ndim == 0:  # counters of steps, which live on the host
        return []
    moved = sum((1 + written) * sum(map(nbytes, value)) for written, value in lists) + sum(map(nbytes, tensors_of(out)))
    results = 0 if any(written for written, _ in lists) or name == "_foreach_norm" else 1
    depth = results + sum(value[0].ndim > 0 for _, value in lists)
    launches = multi_tensor_launches([x.numel() for x in first], depth)
    # The bytes are divided over the launches.
    kernels = [Kernel(name, ATEN, 0, moved // launches)] * launches
    return kernels + [Kernel(f"{name} (sums)", ATEN, 0, 0)] * launches if name == "_foreach_norm" else kernels


def multi_tensor_launches(numels: Sequence[int], depth: int) -> int:
    """Launches of an operator on `depth` lists of tensors of these sizes."""
    launches = tensors = chunks = 0
    for numel in numels:
        tensors += 1
        left = -(-numel // CHUNK)
        while left:
            taken = min(left, CHUNKS_A_LAUNCH - chunks)
            left, chunks = left - taken, chunks + taken
            full = tensors == TENSORS_A_LAUNCH[depth] and not left
            if chunks == CHUNKS_A_LAUNCH or full:
                launches, chunks = launches + 1, 0
                tensors = 1 if left else 0
    return launches + (chunks > 0)


def kernel_of_launch(launch: Launch) -> Kernel:
    """One of our Triton kernels, with every byte that it accesses once."""
    name = launch.kernel.__name__
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    tensors = {key: x for key, x in arguments.items() if isinstance(x, Tensor)}
    partial = PARTIAL.get(name)
    skipped, extra = partial(arguments) if partial else ((), 0)
    moved = extra + sum(nbytes(x) for key, x in tensors.items() if key not in skipped)
    products = (1 + ("weight1_ptr" in tensors)) if "K" in arguments and "M" in arguments else 0
    flops = products * 2 * arguments["M"] * arguments["N"] * arguments["K"] if products else 0
    if name == "_symmetric_kernel":  # of the tiles computed
        flops = prod(launch.grid) * 2 * arguments["BLOCK"] ** 2 * arguments["C"]
    return Kernel(name, OURS + name.strip("_").removesuffix("_kernel"), flops, moved)


def _lower_tiles(a: dict) -> tuple[tuple[str, ...], int]:
    if a["add_ptr"] is None:
        return (), 0
    n, r, _ = a["add_ptr"].shape
    ends = [min(r, first + a["BLOCK"]) for first in range(0, r, a["BLOCK"])]
    values = sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))
    return ("add_ptr",), n * values * a["add_ptr"].element_size()


def _selected_tokens(a: dict) -> tuple[tuple[str, ...], int]:
    return ("tokens_ptr",), nbytes(a["out_ptr"])


def _selected_pixels(a: dict) -> tuple[tuple[str, ...], int]:
    return ("frames_ptr",), a["out_ptr"].numel() * a["frames_ptr"].element_size()


def _predicted_pixels(a: dict) -> tuple[tuple[str, ...], int]:
    return ("frames_ptr",), a["pred_ptr"].numel() * a["frames_ptr"].element_size()


def _rotated_in_place(a: dict) -> tuple[tuple[str, ...], int]:
    qkv = a["qkv_ptr"]
    return ("qkv_ptr", "out_ptr"), 2 * len(qkv) * a["HEADS"] * 2 * a["HALF"] * qkv.element_size()


def _packed_parts(a: dict) -> tuple[tuple[str, ...], int]:
    return ("second_ptr", "third_ptr")[a["PARTS"] - 1 :], 0  # unused arguments repeat the last part


def _finished_sums(a: dict) -> tuple[tuple[str, ...], int]:
    return ("out1_ptr", "out2_ptr")[len(a["partial_ptr"]) - 1 :], 0


# Kernels that access a part of an argument: arguments to leave out, and bytes to count instead.
PARTIAL = {
    "_finish_kernel": _finished_sums,
    "_gather_kernel": _selected_tokens,
    "_gather_patches_kernel": _selected_pixels,
    "_pack_kernel": _packed_parts,
    "_patch_loss_kernel": _predicted_pixels,
    "_rope_kernel": _rotated_in_place,
    "_symmetric_kernel": _lower_tiles,
}
