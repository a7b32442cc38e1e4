"""Inductor's kernels of a region, forward and backward, for an absent GPU.

The region is traced on fake CPU tensors, because autograd needs a driver for CUDA tensors; then the devices in the two
graphs are replaced, and Inductor lowers them as it would on that GPU. Its scheduler knows the bytes of each generated
kernel; calls of operators are costed by `operators`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch._functorch.config
import torch._inductor.config
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dynamo.utils import detect_fake_mode
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, ir, memory
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import (
    BaseSchedulerNode,
    ExternKernelSchedulerNode,
    FusedMixOrderReductions,
    NopKernelSchedulerNode,
)
from torch._inductor.utils import Placeholder
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from benchmarks.offline.absent_gpu import DEVICE
from benchmarks.offline.kernel import POINTWISE, REDUCTIONS, Kernel
from benchmarks.offline.recorder import Recorder

# A kernel that reduces along both axes writes partial sums, which PyTorch sums afterwards.
SUM_OF_PARTIALS = re.compile(r"workspace_\d+\[.*\]\.view\((\d+), (\d+)\)\.sum\(dim=0\)")


Signature = tuple[torch.Size, torch.dtype]


def signature(x: Tensor) -> Signature:
    """A key of a block's large inputs: the stream is float32, its norm bfloat16."""
    return x.shape, x.dtype


class Graph(NamedTuple):
    """A lowered graph.

    Args:
        kernels: that it launches.
        peak: bytes that it holds at most, beyond weights and other inputs that live on.
    """

    kernels: list[Kernel]
    peak: int


class Region(NamedTuple):
    """A compiled region.

    Args:
        forward, backward: its graphs.
        outputs: what it returns.
        saved: tensors saved for the backward pass, without inputs.
        held: signatures of the inputs that are saved.
        sources: Triton code of its kernels by name.
    """

    forward: Graph
    backward: Graph
    outputs: list[Tensor]
    saved: list[Tensor]
    held: frozenset[Signature]
    sources: dict[str, str]


class _Traced(BaseException):  # no caller may catch it
    """Ends a call as soon as it is traced."""


def compile_region(function: Callable, args: Sequence, recorder: Recorder) -> Region:
    """Trace a call that needs a gradient as one graph, differentiate and lower it.

    Args:
        function: of tensors and other things, as for `torch.compile(fullgraph=True)`.
        args: its tensors are fake, on the CPU.
        recorder: costs the operators that are called, and keeps their launches; it is not recording now.
    """
    graph, inputs = _trace(function, args)
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence, **_: object) -> Callable:
        graphs.append(gm)
        return lambda *_: None  # never called

    with (
        tracing(TracingContext(detect_fake_mode(inputs))),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch.autocast("cpu", torch.bfloat16),
    ):
        compile_fx.compile_fx(graph, inputs, inner_compile=keep)
    forward, backward = (_lower(gm, bool(is_backward), recorder) for is_backward, gm in enumerate(graphs))
    (output,) = graph.graph.find_nodes(op="output")
    outputs = list(forward.outputs.values())[: len(output.args[0])]
    kept = {name: x for name, x in forward.outputs.items() if name in backward.inputs}
    saved = [x for name, x in kept.items() if not name.startswith("primals")]
    held = frozenset(signature(x) for name, x in kept.items() if name.startswith("primals"))
    return Region(forward.graph, backward.graph, outputs, saved, held, forward.sources | backward.sources)


def _trace(function: Callable, args: Sequence) -> tuple[fx.GraphModule, Sequence[Tensor]]:
    def backend(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
        raise _Traced(gm, inputs)

    torch._dynamo.reset()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(function, fullgraph=True, backend=backend)(*args)
    except _Traced as traced:
        return traced.args
    finally:
        torch._dynamo.reset()
    raise AssertionError("nothing was compiled")


class _Lowered(NamedTuple):
    graph: Graph
    inputs: set[str]
    outputs: dict[str, Tensor]
    sources: dict[str, str]


def _lower(gm: fx.GraphModule, is_backward: bool, recorder: Recorder) -> _Lowered:
    """The steps of Inductor's own compilation, up to the code of the wrapper."""
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    outputs = {n.name: n.meta["val"] for n in output.args[0] if isinstance(n, fx.Node)}
    with unset_fake_temporarily(), torch.no_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        inputs = _move(gm, mode)
        compile_fx.view_to_reshape(gm)
        compile_fx.fake_tensor_prop(gm, inputs)
        compile_fx._recursive_record_original_output_strides(gm)
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            compile_fx._recursive_post_grad_passes(gm, is_inference=False)
            graph = GraphLowering(gm, example_inputs=inputs, is_inference=False, is_backward=is_backward)
            graph.freeze_runtime_asserts()
            with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
                graph.run(*inputs)
                wrapper, _ = graph.codegen()
                kernels = _kernels(graph, wrapper.value, recorder)
                scheduler = graph.scheduler
                peak, _ = memory.prepare_planning_info(
                    scheduler.nodes,
                    scheduler.name_to_buf,
                    scheduler.name_to_fused_node,
                    graph.graph_inputs.keys(),
                    graph.get_output_names(),
                )
    sources = {name: _complete(code) for code, name in graph.wrapper_code.src_to_kernel.items()}
    return _Lowered(Graph(kernels, peak), set(graph.graph_inputs), outputs, sources)


def _complete(code: str) -> str:
    """Generated code with one name for all kernels, so that equal kernels have equal code."""
    for placeholder in (Placeholder.DESCRIPTIVE_NAME, Placeholder.KERNEL_NAME):
        code = code.replace(str(placeholder), "triton_")
    return code.replace("#pragma CMT", "#")


def _move(gm: fx.GraphModule, mode: FakeTensorMode) -> list[object]:
    """Replace the device of everything in a graph; returns its inputs on the new device."""

    def there(x: object) -> object:
        return DEVICE if isinstance(x, torch.device) and x.type == "cpu" else x

    inputs = []
    for node in gm.graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(tree, there) for tree in (node.args, node.kwargs))
        if node.op == "placeholder":
            value = node.meta["val"]
            if isinstance(value, Tensor):
                with mode:
                    value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
                node.meta["val"] = value
            inputs.append(value)
    return inputs


def _kernels(graph: GraphLowering, wrapper: str, recorder: Recorder) -> list[Kernel]:
    kernels = []
    for node in graph.scheduler.nodes:
        if isinstance(node, ExternKernelSchedulerNode):
            kernels += _of_call(node.node, recorder)
        elif not isinstance(node, NopKernelSchedulerNode):
            kernels.append(_of_generated(node))
    for rows, columns in SUM_OF_PARTIALS.findall(wrapper):
        # The kernel writes them in float32; they are read here.
        partials, sums = 4 * int(rows) * int(columns), 4 * int(columns)
        kernels.append(Kernel("sum of partial sums", REDUCTIONS, 0, 2 * partials + sums))
    return kernels


def _of_generated(node: BaseSchedulerNode) -> Kernel:
    origins = sorted({str(origin.target) for n in node.get_nodes() for origin in n.node.origins if n.node is not None})
    is_reduction = isinstance(node, FusedMixOrderReductions) or node.is_reduction()
    return Kernel(", ".join(origins), REDUCTIONS if is_reduction else POINTWISE, 0, node.get_read_write_buffers_sizes())


def _of_call(node: ir.ExternKernel, recorder: Recorder) -> list[Kernel]:
    """Kernels of an operator that generated code calls."""
    if isinstance(node, ir.MultiOutput):
        return []
    with V.fake_mode:
        inputs = [_fake(x) if isinstance(x, ir.IRNode) else x for x in node.inputs]
    if isinstance(node, ir.FallbackKernel):
        op = node.op_overload
        args, kwargs = node.unflatten_args(inputs, node.constant_args)
        kwargs |= {k: v for k, v in node.kwargs.items() if k not in kwargs}
    elif isinstance(node, (ir.ExternKernelOut, ir.ExternKernelAlloc)) and node.op_overload is not None:
        op = node.op_overload.overloadpacket.default
        args, kwargs = (*inputs, *node.constant_args), dict(node.kwargs)
        # Arguments that are left out, such as the bias of a convolution, are at their end.
        names = [argument.name for argument in op._schema.arguments]
        kwargs = {name: None for name in names[len(args) :] if name == "bias"} | kwargs
    else:
        raise NotImplementedError(f"no cost is known of {type(node).__name__} {node.python_kernel_name}")
    args, kwargs = pytree.tree_map_only(torch.device, lambda _: DEVICE, (tuple(args), kwargs))
    before = len(recorder.kernels)
    with V.fake_mode, recorder:
        op(*args, **kwargs)
    kernels = recorder.kernels[before:]
    del recorder.kernels[before:]
    return kernels


def _fake(x: ir.IRNode) -> Tensor:
    hint = V.graph.sizevars.optimization_hint
    size, stride = ([hint(n) for n in part] for part in (x.get_size(), x.get_stride()))
    return torch.empty_strided(size, stride, dtype=x.get_dtype(), device=DEVICE)
