"""The operator for packed segments with every kernel, computed on the CPU in float64; and the choice of a kernel."""

import json
import logging
from collections.abc import Iterator

import packages
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from truth import LENGTHS, Problem, assert_within, cumulated, equal, gradients, problem

from fastmum.attention import BACKENDS, Segments, cuda, flash, ragged_attention, sdpa, varlen
from fastmum.attention.varlen import KERNELS, Plan, agrees, attend_by

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
RUNNING = {"FA2": "flash", "cuDNN": "cudnn", "flash_attn_4": "flash_attn_4"}  # what the kernel calls


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[packages.VarlenKernels]:
    torch._dynamo.reset()
    kernels = packages.VarlenKernels(monkeypatch)
    yield kernels
    kernels.library._destroy()


def segments_of(p: Problem, padding: int = 0) -> Segments:
    """Segments that are empty on both sides come last, as in the model."""
    pairs = sorted(zip(p.queries, p.keys, strict=True), key=lambda pair: pair == (0, 0)) + [(0, 0)] * padding
    cu_q, cu_k = (cumulated(lengths) for lengths in zip(*pairs, strict=True))
    sizes = sum(pair != (0, 0) for pair in pairs), max(p.queries), max(p.keys)
    return Segments(cu_q, cu_k, 1000, 2000, torch.tensor(sizes, dtype=torch.int32))


@pytest.mark.parametrize("kernel", RUNNING)
@pytest.mark.parametrize("width", [48, 64])
@pytest.mark.parametrize("lengths", ["ragged, subset", "empty"])
def test_values_and_gradients(kernels, kernel, width, lengths):
    queries, keys = LENGTHS[lengths]
    p = problem(keys, 2, width, queries=queries)
    q, k, v = (torch.stack([x, x], 1)[:, 1] for x in p[:3])  # views, as of a packed tensor
    ours = gradients(lambda *x: attend_by(*x, Plan(segments_of(p, 90), kernel)), p._replace(q=q, k=k, v=v))
    assert all(x.is_contiguous() for x in ours)
    assert_within(ours, p, 1e-5)
    exact = [n for n in queries if n], [n for n in keys if n], max(queries), max(keys)
    assert kernels.calls == [exact]  # nothing but the segments with tokens
    assert kernels.names == [RUNNING[kernel]]


@pytest.mark.parametrize("kernel", RUNNING)
def test_it_compiles_once_for_all_lengths(kernels, kernel):
    counter = CompileCounterWithBackend("aot_eager")
    attend = lambda q, k, v, plan: torch.relu(attend_by(q * 2, k, v, plan))  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for seed, lengths in enumerate(([8], [3, 3, 2], [1] * 8, [5, 2, 1])):
        p = problem([8 * 5], 2, 16, queries=[8 * 3], seed=seed)
        plan = Plan(Segments.of_frames(lengths, 8, 3, 5, 8), kernel)
        ours, eager = (gradients(lambda *x, f=f, plan=plan: f(*x, plan), p) for f in (compiled, attend))
        assert equal(ours, eager)
        exact = [3 * n for n in lengths], [5 * n for n in lengths], 3 * max(lengths), 5 * max(lengths)
        assert kernels.calls[-2:] == [exact, exact]
    assert counter.frame_count == 1


def test_xformers_compiles_once_for_all_lengths(monkeypatch):
    """At the width of the released decoder; its masks are Python lists, inside of an operator."""
    torch._dynamo.reset()
    packages.install_xformers(monkeypatch)
    cuda._mask_of_lengths.cache_clear()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(BACKENDS["xformers"].attend, fullgraph=True, backend=counter)
    for lengths in ([4], [3, 1], [1] * 4):
        p = problem([5 * n for n in lengths], 2, 48, queries=[3 * n for n in lengths])
        plan = BACKENDS["xformers"].plan(Segments.of_frames(lengths, 4, 3, 5, 4), CPU)
        assert_within(gradients(lambda *x, plan=plan: compiled(*x, plan), p), p, 1e-5)
    assert counter.frame_count == 1
    cuda._mask_of_lengths.cache_clear()


@pytest.mark.parametrize("with_sizes", [True, False])
def test_opcheck(kernels, with_sizes):
    p = problem([5, 1, 7], 2, 16, queries=[3, 1, 2])
    cu_q, cu_k, *_, sizes = segments_of(p)
    inputs = [x.requires_grad_() for x in p[:3]]
    rest = cu_q, cu_k, sizes if with_sizes else None
    torch.library.opcheck(torch.ops.fastmum.varlen_attention, (*inputs, *rest, 9, 9, "FA2"))
    out, lse = (x.detach() for x in varlen.varlen_attention(*inputs, *rest, 9, 9, "FA2"))
    saved = p.grad, *(x.detach() for x in inputs), *rest, out, lse, 9, 9, "FA2"
    torch.library.opcheck(torch.ops.fastmum.varlen_attention_backward, saved)


def test_without_sizes_all_segments_and_bounds(kernels):
    """As CUDA graphs record them, and where lengths are on the device only."""
    p = problem([65, 9], 2, 16, queries=[48, 0])
    segments = Segments.of_frames([2, 1], 5, 3, 7, 4)._replace(sizes=None)
    q, k, v, _ = varlen.sample(segments, CPU, torch.float32, 2, 16)
    attend_by(q, k, v, Plan(segments, "FA2"))
    assert kernels.calls == [([6, 3, 6, 0, 0], [14, 7, 14, 0, 0], 12, 28)]
    nothing = p._replace(keys=[0, 0], queries=[48, 0], k=p.k[:0], v=p.v[:0])
    ours = gradients(lambda *x: attend_by(*x, Plan(segments_of(nothing), "FA2")), nothing)
    assert all(x.count_nonzero() == 0 for x in ours)
    assert len(kernels.calls) == 1  # no kernel has an empty grid


def test_cudnn_is_left_where_segments_are_short(kernels):
    p = problem([128, 60], 2, 16)
    assert_within(gradients(lambda *x: attend_by(*x, Plan(segments_of(p), "cuDNN")), p), p, 1e-5)
    assert kernels.names == ["flash"]


def test_arguments_fit_the_installed_torch():
    """Its shape functions of the flash operators, on CUDA tensors without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(n, 3, 2, 48, device=CUDA, dtype=torch.bfloat16)[:, 0] for n in (9, 15, 15))
        segments = *(torch.empty(4, dtype=torch.int32, device=CUDA) for _ in range(2)), 5, 9
        out, lse = KERNELS["FA2"].forward(q, k, v, *segments)
        grads = KERNELS["FA2"].backward(out, q, k, v, out, lse, *segments)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 9), torch.float32)
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]


def test_sdpa_on_cuda_is_two_kernels_a_group(monkeypatch, kernels):
    """Not the pieces that fit a CPU's cache; the memory-efficient kernel is called again for its log-sum-exp."""
    monkeypatch.setattr(sdpa, "has_fused_backward", lambda q: True)
    p = problem([65, 65, 9, 0, 4], 2, 48, queries=[48, 48, 9, 0, 0])
    ours = gradients(lambda q, k, v: ragged_attention(q, k, v, backend="sdpa", **p.segments), p)
    assert_within(ours, p, 1e-5)
    assert kernels.names == ["efficient"] * 2


def wrong(monkeypatch: pytest.MonkeyPatch, kernel: str, change: object) -> None:
    """Replace the backward pass of a kernel by `change` of its gradients."""
    forward, backward = KERNELS[kernel]
    monkeypatch.setitem(KERNELS, kernel, varlen.Kernel(forward, lambda *args: change(*backward(*args))))


def refuse(*grads: Tensor) -> None:
    raise RuntimeError("no engine of cuDNN supports this graph")


def with_nan(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, ...]:
    dv[0] = torch.nan
    return dq, dk, dv


@pytest.mark.parametrize("change", [lambda dq, dk, dv: (dq, dk * 1.1, dv), with_nan, refuse])
def test_self_check(monkeypatch, caplog, kernels, change):
    assert agrees("cuDNN", CPU, torch.bfloat16, 2, 48)
    assert not caplog.messages
    assert {len(queries) for queries, *_ in kernels.calls} == {5}
    wrong(monkeypatch, "cuDNN", change)
    assert not agrees("cuDNN", CPU, torch.bfloat16, 2, 48)
    (message,) = caplog.messages
    assert "cuDNN" in message


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path, kernels) -> Iterator[dict[str, float]]:
    """A Hopper GPU with cuDNN 9.25, whose tensors are on the CPU; milliseconds of its kernels, in the order of runs."""
    monkeypatch.setenv("FASTMUM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92500)
    monkeypatch.setattr(flash.Backend, "is_installed", staticmethod(lambda package: False))
    monkeypatch.setattr(flash, "sample", lambda segments, device, *rest: varlen.sample(segments, CPU, *rest))
    monkeypatch.setattr(varlen, "sample", lambda segments, device, *rest: SAMPLE(segments, CPU, *rest))
    monkeypatch.setattr(Segments, "to", lambda self, device: self)
    times = {"flash": 2.0, "cudnn": 1.0}

    def milliseconds(run: object) -> float:
        run()
        return times[kernels.names[-1]]

    monkeypatch.setattr(flash, "milliseconds", milliseconds)
    monkeypatch.setattr(BACKENDS["flash"], "chosen", None)
    flash.candidates.cache_clear()
    yield times
    flash.candidates.cache_clear()


SAMPLE = varlen.sample
BATCH = Segments.of_frames([3, 2, 1], 6, 50, 50, 4)


def prepare() -> str:
    return BACKENDS["flash"].prepare(CUDA, torch.bfloat16, 2, 16, BATCH)


def test_the_fastest_kernel_is_chosen_once(monkeypatch, gpu, kernels, tmp_path):
    backend = BACKENDS["flash"]
    assert "by cuDNN, in CUDA graphs by FA" in prepare()
    assert backend.plan(BATCH, CUDA).kernel == "cuDNN"
    assert backend.plan(BATCH._replace(sizes=None), CUDA).kernel == "FA2"  # cuDNN computes exact segments only
    gpu["cudnn"] = 3.0
    assert "by cuDNN, in" in prepare()  # from the cache
    (file,) = tmp_path.glob("measured/*.json")
    assert json.loads(file.read_text())["ms"] == {"FA2": 2.0, "cuDNN": 1.0}
    for damaged in ("", "[]", '{"ms": {"FA2": 1.0}}', '{"ms": {"FA2": 1.0, "cuDNN": "1"}}'):
        file.write_text(damaged)
        assert "by FA2 (" in prepare()  # measured again
    monkeypatch.setenv("FASTMUM_CACHE", "/proc/nowhere")
    assert "by FA2 (" in prepare()


def test_kernels_that_are_not_measured(monkeypatch, caplog, gpu):
    """cuDNN before 9.25; kernels that fail their check; deterministic runs."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)
    assert flash.candidates(CUDA) == ("FA2",)
    assert prepare() == "flash by FA2"
    flash.candidates.cache_clear()
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92500)
    assert flash.candidates(CUDA) == ("FA2", "cuDNN")
    wrong(monkeypatch, "cuDNN", lambda dq, dk, dv: (dq * 0, dk, dv))
    with caplog.at_level(logging.WARNING, "fastmum"):
        assert prepare() == "flash by FA2"
    assert "cuDNN" in caplog.text
    flash.candidates.cache_clear()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert flash.candidates(CUDA) == ("FA2",)


def test_the_model_computes_exact_segments_unless_cuda_graphs_record(monkeypatch, kernels, tiny):
    """`flash` in the whole model against `sdpa`, forward and backward, in bfloat16."""
    monkeypatch.setattr(BACKENDS["flash"], "why_not", lambda device: None)
    frames, noise = torch.randn(5, 3, 32, 48), torch.rand(5, 6)
    results = []
    for attention, graphs in (("sdpa", False), ("flash", False), ("flash", True)):
        tiny.attention, tiny.cuda_graphs = attention, graphs
        with torch.autocast("cpu", torch.bfloat16):
            loss = tiny(frames, [2, 3], 0.5, noise, max_views=4).loss
        results.append([loss, *torch.autograd.grad(loss, list(tiny.parameters()))])
    for others in results[1:]:
        torch.testing.assert_close(others, results[0], rtol=0.1, atol=0.003)
    exact, padded = ([6, 9], [14, 21], 9, 21), ([6, 9, 0, 0, 0], [14, 21, 0, 0, 0], 12, 28)
    assert [exact, padded] == kernels.calls  # of the one global block, which computes masked patches
