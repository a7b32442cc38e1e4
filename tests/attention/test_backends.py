"""The table of backends, and each CUDA backend by fake tensors and a stand-in of its package."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import packages
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import attention
from torch.utils._python_dispatch import TorchDispatchMode
from truth import Problem, assert_within, cumulated, gradients, problem

from fastmum.attention import BACKENDS, AttentionError, Segments, choose_backend, cuda, flash, ragged_attention
from fastmum.attention.backend import constant_in_graphs

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
QUERIES, KEYS = [3, 1, 5], [5, 1, 9]
SEGMENTS = Segments(cumulated(QUERIES), cumulated(KEYS), 5, 9)
CAN_GO_BACK = hasattr(attention, "restore_flash_attention_impl")  # torch 2.10 cannot


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    """Results of stand-ins must not outlive them."""
    yield
    flash.candidates.cache_clear()
    cuda._mask_of_lengths.cache_clear()


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    """Tensors without memory: CUDA tensors with no GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def cuda_problem(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """q of 9 tokens, k and v of 15, views of a packed tensor as in the model."""
    q = torch.empty(sum(QUERIES), 3, 2, 64, device=CUDA, dtype=dtype)[:, 0]
    k, v = torch.empty(sum(KEYS), 2, 2, 64, device=CUDA, dtype=dtype).unbind(1)
    return q, k, v


def on_cuda(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens; a fake tensor under `fake`."""
    return torch.empty(len(lengths) + 1, dtype=dtype, device=CUDA)


def test_choice_by_device():
    for device in ("cpu", "mps", "meta", CPU):
        assert choose_backend("auto", device) is choose_backend(device=device) is BACKENDS["sdpa"]
    for device in ("cuda:1", CUDA):
        assert [choose_backend(x, device).name for x in ("auto", "sdpa", "flex")] == ["flash", "sdpa", "flex"]
    for name in {"flash2", *BACKENDS} - {"sdpa"}:
        with pytest.raises(AttentionError, match=f"'{name}' .*(unknown; one of auto, flash, |CUDA device)"):
            choose_backend(name, "cpu")


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"sdpa"}))
def test_absent_package(monkeypatch, name):
    package = BACKENDS[name].package
    root = package if package.startswith("torch.") else package.partition(".")[0]
    for module in [m for m in sys.modules if m.startswith(root + ".")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, root, None)
    with pytest.raises(AttentionError, match=f"'{name}' .*'{package}' is not") as caught:
        choose_backend(name, "cuda")
    assert BACKENDS[name].install in str(caught.value)


def test_remedy_is_an_extra_that_exists():
    for name in ("flash_attn", "flash_attn_4", "xformers"):
        extra = BACKENDS[name].install.partition("fastmum[")[2].partition("]")[0]
        assert f'"{extra}": ["{name.replace("_", "-")}' in (ROOT / "setup.py").read_text()


def test_broken_package(monkeypatch, tmp_path):
    """Built for another torch: importing it fails with a line of the linker's."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    for module in [m for m in sys.modules if m.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn_4"):
        with pytest.raises(AttentionError, match=r"_ZN3c10.*pip install"):
            choose_backend(name, "cuda")


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_flash_attn_4_needs_hopper(monkeypatch, capability):
    packages.install(monkeypatch, "flash_attn.cute")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with pytest.raises(AttentionError, match="flash_attn_interface"):
        choose_backend("flash_attn", "cuda")  # both live in `flash_attn`
    if capability[0] >= 9:
        assert choose_backend("flash_attn_4", "cuda").name == "flash_attn_4"
    else:
        with pytest.raises(AttentionError, match=r"sm_90 .* sm_89"):
            choose_backend("flash_attn_4", "cuda")


class Copies(TorchDispatchMode):
    """Which copies wait and which do not."""

    def __init__(self) -> None:
        super().__init__()
        self.non_blocking: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            self.non_blocking.append(kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


@pytest.mark.parametrize(("dtype", "cu_dtype"), [(torch.bfloat16, torch.int32), (torch.float16, torch.int64)])
def test_call_of_flash_attn(monkeypatch, fake, dtype, cu_dtype):
    """With segments on the device, and as in the model: made on the CPU and copied once per batch."""
    recorded = packages.Recorded(packages.flash_attn_2)
    packages.install(monkeypatch, "flash_attn", flash_attn_varlen_func=recorded)
    packages.install(monkeypatch, "flash_attn.flash_attn_interface", flash_attn_varlen_func=recorded)
    q, k, v = cuda_problem(dtype)
    cu_q, cu_k = on_cuda(QUERIES, cu_dtype), on_cuda(KEYS, cu_dtype)
    outs = [ragged_attention(q, k, v, cu_k, 9, backend="flash_attn", cu_seqlens_q=cu_q, max_seqlen_q=5)]
    outs.append(BACKENDS["flash_attn"].attend(q, k, v, BACKENDS["flash_attn"].plan(SEGMENTS, CUDA)))
    names = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    for call, result, out in zip(recorded.calls, recorded.results, outs, strict=True):
        assert call.pop("deterministic") is False
        assert list(call) == names  # no dropout, no causal mask, default scale 1 / sqrt(d)
        assert [call[x] is y for x, y in zip(names, (q, k, v), strict=False)] == [True] * 3
        for cu in names[3:5]:
            assert (call[cu].device, call[cu].dtype, call[cu].shape) == (CUDA, torch.int32, (4,))
        assert [call[x] for x in names[5:]] == [5, 9]
        assert out is result


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sdpa", torch.bfloat16), ("xformers", torch.float32), ("flash", torch.bfloat16), ("flash_attn_4", torch.float16)],
)
def test_fake_tensors_on_cuda(monkeypatch, fake, name, dtype):
    """Custom operators; lengths are read on the CPU at once, or copied to the device without waiting."""
    packages.install_xformers(monkeypatch)
    packages.install(monkeypatch, "flash_attn.cute")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    q, k, v = cuda_problem(dtype)
    backend, on_device = BACKENDS[name], name.startswith("flash")
    with Copies() as copies:
        outs = [backend.attend(q, k, v, plan := backend.plan(SEGMENTS, CUDA))]
    assert copies.non_blocking == [True, True] * on_device
    assert {x.device for x in (plan.segments if on_device else plan)[:2]} == {CUDA if on_device else CPU}
    with Copies() as copies:
        queries = {"cu_seqlens_q": on_cuda(QUERIES), "max_seqlen_q": 5}
        outs.append(ragged_attention(q, k, v, on_cuda(KEYS), 9, backend=name, **queries))
    assert copies.non_blocking == ([] if on_device else [False, False])
    for out in outs:
        assert (out.shape, out.dtype, out.device) == (q.shape, dtype, CUDA)
        assert out.is_contiguous()


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the implementations that torch activates, with fakes in torch's registry."""
    names: list[str] = []
    for name in ("FA3", "FA4"):
        fake = lambda name=name: (names.append(name), SimpleNamespace(remove=lambda: None))[1]  # noqa: E731
        monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, name, fake)
    yield names
    if CAN_GO_BACK:
        attention.restore_flash_attention_impl(_raise_warn=False)


def plan_on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(2):  # once is enough for all batches
            BACKENDS["flash"].plan(SEGMENTS, CUDA)


@pytest.mark.parametrize(
    ("capability", "module", "name"),
    [((8, 0), "flash_attn_interface", None), ((9, 0), "flash_attn_interface", "FA3"), ((9, 0), "", None),
     ((10, 0), "flash_attn.cute", "FA4"), ((10, 0), "", None), ((12, 0), "flash_attn.cute", None)],
)  # fmt: skip
def test_newest_kernels_are_activated(monkeypatch, caplog, activated, capability, module, name):
    """Where they are installed; without a warning where they are not; never for the CPU."""
    for absent in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delitem(sys.modules, "flash_attn.cute")  # its parent is what is absent
    if module:
        packages.install(monkeypatch, module)
    BACKENDS["flash"].plan(SEGMENTS, CPU)
    assert not activated
    plan_on(monkeypatch, capability)
    assert activated == ([name] if name else [])
    assert not caplog.messages
    if CAN_GO_BACK:
        assert attention.current_flash_attention_impl() == name
    if name and CAN_GO_BACK:
        flash.activate("FA2")
        assert attention.current_flash_attention_impl() is None


@pytest.mark.skipif(not CAN_GO_BACK, reason="torch 2.10 keeps the kernels of the test before")
@pytest.mark.parametrize(
    ("capability", "module", "name"),
    [((9, 0), "flash_attn_interface", "FA3"), ((10, 0), "flash_attn.cute.interface", "FA4")],
)
def test_kernels_that_torch_cannot_use(monkeypatch, caplog, capability, module, name):
    """torch refuses a module without kernels: a warning, and FlashAttention 2 runs."""
    packages.install(monkeypatch, module)
    plan_on(monkeypatch, capability)
    (message,) = caplog.messages
    assert name in message
    assert attention.current_flash_attention_impl() is None


@pytest.mark.parametrize("name", ["flash", "flash_attn", "flash_attn_4"])
def test_float32_is_not_for_flash(monkeypatch, name):
    monkeypatch.setattr(type(BACKENDS[name]), "why_not", lambda _self, _device: None)
    assert choose_backend("auto", "cuda", torch.float32).name == "sdpa"
    assert choose_backend(name, "cuda", torch.bfloat16).name == name
    with pytest.raises(AttentionError, match=r"bfloat16 and float16, .* float32"):
        choose_backend(name, "cuda", torch.float32)


def test_constants_are_marked_as_torch_marks_them():
    ours, torchs = (mark(lambda: 0) for mark in (constant_in_graphs, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(torchs) != {}


def by_xformers(p: Problem, padding: int = 0) -> tuple[Tensor, ...]:
    cu_q, cu_k = (cumulated(lengths + [0] * padding) for lengths in (p.queries, p.keys))
    backend = BACKENDS["xformers"]
    plan = backend.plan(Segments(cu_q, cu_k, max(p.queries), max(p.keys)), CPU)
    return gradients(lambda q, k, v: backend.attend(q, k, v, plan), p)


@pytest.mark.parametrize(("queries", "padding"), [(KEYS, 0), (QUERIES, 4)])
def test_xformers_values_and_gradients(monkeypatch, queries, padding):
    recorded = packages.install_xformers(monkeypatch)
    p = problem(KEYS, 2, 16, queries=queries)
    ours = by_xformers(p, padding)
    assert all(value.is_contiguous() for value in ours)
    assert_within(ours, p, 1e-5)
    (mask, *others), calls = zip(
        *((call["attn_bias"], call) for f in recorded.values() for call in f.calls), strict=True
    )
    assert [other is mask for other in others] == [True, True]  # one per batch, in one call of each function
    assert (mask.queries, mask.keys) == (queries, KEYS)
    assert all({"p", "scale"}.isdisjoint(call) for call in calls)
    for keys in ([3, 4], [4, 3], [7], [1] * 7, [3, 4], [2, 5]):
        p = problem(keys, 2, 16)
        assert_within(by_xformers(p), p, 1e-5)
    for queries, keys in (([0, 3], [4, 5]), ([2, 3], [0, 5])):
        with pytest.raises(ValueError, match=r"xformers .*'sdpa'"):
            by_xformers(problem(keys, 2, 16, queries=queries))
