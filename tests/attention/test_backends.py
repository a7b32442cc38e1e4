"""The table of backends, and each CUDA backend by fake tensors and a stand-in of its package."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import packages
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.utils._python_dispatch import TorchDispatchMode
from truth import cumulated

from fastmum.attention import BACKENDS, AttentionError, Spans, choose_backend, flash, ragged_attention
from fastmum.attention.backend import constant_in_graphs

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TORCHS_OWN = {"flash": "torch.nn.attention.varlen", "flex": "torch.nn.attention.flex_attention"}
PACKAGE = {"flash_attn": "flash_attn", "flash_attn_4": "flash_attn", "xformers": "xformers", **TORCHS_OWN}
QUERIES, KEYS = [3, 1, 5], [5, 1, 9]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """Whatever was made of stand-ins must not outlive them."""
    flash._activate_newest.cache_clear()
    yield
    flash._activate_newest.cache_clear()


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


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


# The table -----------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert list(BACKENDS) == ["flash", "flash_attn", "flash_attn_4", "xformers", "sdpa", "flex"]
    assert all(backend.name == name for name, backend in BACKENDS.items())


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu", "meta", torch.device("cpu")])
def test_auto_elsewhere_is_sdpa(device: str | torch.device) -> None:
    assert choose_backend("auto", device).name == "sdpa"
    assert choose_backend(device=device).name == "sdpa"
    assert choose_backend("sdpa", device) is BACKENDS["sdpa"]


@pytest.mark.parametrize("device", ["cuda", "cuda:1", CUDA])
def test_auto_on_cuda_is_flash(device: str | torch.device) -> None:
    assert choose_backend("auto", device).name == "flash"
    assert choose_backend("sdpa", device).name == "sdpa"
    assert choose_backend("flex", device).name == "flex"


def test_unknown_name() -> None:
    message = r"^attention backend 'flash2' is unknown; one of auto, flash, .*, sdpa, flex is allowed$"
    with pytest.raises(AttentionError, match=message):
        choose_backend("flash2")
    x = torch.zeros(2, 1, 4)
    with pytest.raises(AttentionError, match=message):
        ragged_attention(x, x, x, torch.tensor([0, 2]), 2, backend="flash2")


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"sdpa"}))
def test_wrong_device(name: str) -> None:
    message = f"^attention backend '{name}' cannot be used: it needs a CUDA device, and this is 'cpu'; 'auto' takes"
    with pytest.raises(AttentionError, match=message) as caught:
        choose_backend(name, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(PACKAGE))
def test_absent_package(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    backend = BACKENDS[name]
    for module in [m for m in sys.modules if m.startswith(PACKAGE[name] + ".")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, PACKAGE[name], None)
    with pytest.raises(AttentionError) as caught:
        choose_backend(name, "cuda")
    message = str(caught.value)
    assert message.startswith(f"attention backend '{name}' cannot be used: the package '{backend.package}' is not")
    assert backend.install in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name",
    [
        "flash_attn",
        "flash_attn_4",
        "xformers",
    ],
)
def test_remedy_is_an_extra_that_exists(name: str) -> None:
    extra = BACKENDS[name].install.partition("fastmum[")[2].partition("]")[0]
    assert f'"{extra}": ["{name.replace("_", "-")}' in (ROOT / "setup.py").read_text()


def test_broken_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Built for another torch: importing it fails with a line of the linker's."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    for module in [m for m in sys.modules if m.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn_4"):
        with pytest.raises(AttentionError, match=r"is installed but cannot be imported .*_ZN3c10.*pip install"):
            choose_backend(name, "cuda")


def test_flash_attn_4_alone_is_not_flash_attn_2(monkeypatch: pytest.MonkeyPatch, ampere: None) -> None:
    """Both live in `flash_attn`."""
    packages.install(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=packages.flash_attn_4)
    with pytest.raises(AttentionError, match=r"'flash_attn\.flash_attn_interface' is not installed"):
        choose_backend("flash_attn", "cuda")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_flash_attn_4_needs_hopper(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    packages.install(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=packages.flash_attn_4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    if capability[0] >= 9:
        assert choose_backend("flash_attn_4", "cuda").name == "flash_attn_4"
    else:
        with pytest.raises(
            AttentionError, match=f"sm_90 and later only, and this is sm_{capability[0]}{capability[1]};"
        ):
            choose_backend("flash_attn_4", "cuda")


# Packages that take cu_seqlens ---------------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[packages.Recorded, list[str]]:
    """A recorder in the place of the function behind the backend, and the names of its arguments in order."""
    if name == "flash":
        recorded = packages.Recorded(varlen.varlen_attn, lambda query, *args, **kwargs: torch.empty_like(query))
        monkeypatch.setattr(varlen, "varlen_attn", recorded)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        return recorded, ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    if name == "flash_attn":
        recorded = packages.Recorded(packages.flash_attn_2)
        packages.install(monkeypatch, "flash_attn", flash_attn_varlen_func=recorded)
        packages.install(monkeypatch, "flash_attn.flash_attn_interface", flash_attn_varlen_func=recorded)
    else:
        recorded = packages.Recorded(packages.flash_attn_4)
        packages.install(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=recorded)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return recorded, ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["flash", "flash_attn", "flash_attn_4"])
def test_call(
    monkeypatch: pytest.MonkeyPatch, fake: FakeTensorMode, name: str, dtype: torch.dtype, cu_dtype: torch.dtype
) -> None:
    recorded, names = stand_in(monkeypatch, name)
    q, k, v = cuda_problem(dtype)
    cu_q, cu_k = on_cuda(QUERIES, cu_dtype), on_cuda(KEYS, cu_dtype)
    out = ragged_attention(q, k, v, cu_k, 9, backend=name, cu_seqlens_q=cu_q, max_seqlen_q=5)
    (call,), (result,) = recorded.calls, recorded.results
    assert list(call) == names  # nothing else is said: no dropout, no causal mask, scale 1 / sqrt(d)
    assert [call[x] is y for x, y in zip(names, (q, k, v), strict=False)] == [True] * 3
    for cu in names[3:5]:
        assert (call[cu].device, call[cu].dtype, call[cu].shape) == (CUDA, torch.int32, (4,))
    if cu_dtype == torch.int32:  # nothing to convert
        assert [call[x] is y for x, y in zip(names[3:5], (cu_q, cu_k), strict=True)] == [True] * 2
    assert [call[x] for x in names[5:]] == [5, 9]
    assert all(type(call[x]) is int for x in names[5:])
    assert out is (result[0] if isinstance(result, tuple) else result)
    assert (out.shape, out.dtype, out.device) == (q.shape, dtype, CUDA)


@pytest.mark.parametrize("name", ["flash", "flash_attn", "flash_attn_4"])
def test_call_of_self_attention(monkeypatch: pytest.MonkeyPatch, fake: FakeTensorMode, name: str) -> None:
    recorded, names = stand_in(monkeypatch, name)
    _, k, v = cuda_problem()
    ragged_attention(k, k, v, on_cuda(KEYS), 100, backend=name)
    (call,) = recorded.calls
    assert [call[x] for x in names[5:]] == [100, 100]
    assert [call[x].shape for x in names[3:5]] == [(4,), (4,)]


@pytest.mark.parametrize("name", ["flash", "flash_attn", "flash_attn_4"])
def test_plan_in_the_models_way(monkeypatch: pytest.MonkeyPatch, fake: FakeTensorMode, name: str) -> None:
    """Spans are made on the CPU, brought to the device once a batch, and handed to every block."""
    recorded, names = stand_in(monkeypatch, name)
    with Copies() as copies:
        plan = BACKENDS[name].plan(Spans.of_frames(torch.tensor([2, 1]), 4, 3, 5, 6), CUDA)
    assert copies.non_blocking == [True, True]
    q, k, v = (torch.empty(n, 2, 64, device=CUDA, dtype=torch.bfloat16) for n in (12, 20, 20))
    for _ in range(2):
        BACKENDS[name].attend(q, k, v, plan)
    first, second = recorded.calls
    assert all(first[x] is second[x] for x in names[3:5])
    assert all(first[x].shape == (5,) and first[x].device == CUDA for x in names[3:5])
    assert [first[x] for x in names[5:]] == [18, 30]


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


@pytest.mark.parametrize("name", ["sdpa", "xformers"])
def test_lengths_from_the_gpu_are_waited_for(fake: FakeTensorMode, name: str) -> None:
    """They are read on the CPU as soon as the copy returns."""
    with Copies() as copies:
        plan = BACKENDS[name].plan(Spans(on_cuda(QUERIES), on_cuda(KEYS), 5, 9), CUDA)
    assert copies.non_blocking == [False, False]
    assert plan.cu_q.device == plan.cu_k.device == CPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["sdpa", "xformers"])
def test_opaque_operator_on_cuda(
    monkeypatch: pytest.MonkeyPatch, fake: FakeTensorMode, name: str, dtype: torch.dtype
) -> None:
    packages.install_xformers(monkeypatch)
    q, k, v = cuda_problem(dtype)
    cu_q, cu_k = on_cuda(QUERIES), on_cuda(KEYS)
    out = ragged_attention(q, k, v, cu_k, 9, backend=name, cu_seqlens_q=cu_q, max_seqlen_q=5)
    assert (out.shape, out.dtype, out.device) == (q.shape, dtype, CUDA)
    assert out.is_contiguous()


# torch's own ---------------------------------------------------------------------------------------------------------


def test_varlen_attn_traced_on_cuda(fake: FakeTensorMode, ampere: None) -> None:
    """The real function, up to its kernel."""
    q, k, v = cuda_problem()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = ragged_attention(
            q, k, v, on_cuda(KEYS), 9, backend="flash", cu_seqlens_q=on_cuda(QUERIES), max_seqlen_q=5
        )
    assert (out.shape, out.dtype, out.device) == (q.shape, torch.bfloat16, CUDA)


def test_varlen_attn_traced_backward() -> None:
    """On the meta device, since the gradients of fake CUDA tensors ask for a driver."""
    q, k, v = (torch.empty(n, 2, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in (9, 15, 15))
    spans = Spans(cumulated(QUERIES), cumulated(KEYS), 5, 9)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        plan = BACKENDS["flash"].plan(spans, torch.device("meta"))
        out = BACKENDS["flash"].attend(q, k, v, plan)
    grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    assert all(x.dtype == torch.bfloat16 for x in grads)


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names that torch was told to activate, with kernels that are none."""
    names: list[str] = []
    for name in ("FA3", "FA4"):
        # Through torch's registry, since the real kernels would stay registered.
        monkeypatch.setitem(
            attention._registry._FLASH_ATTENTION_IMPLS, name, lambda name=name: (names.append(name), Handle())[1]
        )
    yield names
    attention.restore_flash_attention_impl(_raise_warn=False)


class Handle:
    def remove(self) -> None:
        """There is nothing to remove."""


def plan_on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(2):  # once is enough for all batches
            BACKENDS["flash"].plan(Spans(cumulated(QUERIES), cumulated(KEYS), 5, 9), CUDA)


@pytest.mark.parametrize(
    ("capability", "module", "name"), [((9, 0), "flash_attn_interface", "FA3"), ((10, 0), "flash_attn.cute", "FA4")]
)
def test_newest_kernels_are_activated(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    activated: list[str],
    capability: tuple[int, int],
    module: str,
    name: str,
) -> None:
    packages.install(monkeypatch, module)
    with caplog.at_level(logging.INFO, "fastmum"):
        plan_on(monkeypatch, capability)
    assert activated == [name]
    assert attention.current_flash_attention_impl() == name
    assert caplog.messages == [f"flash attention by {name}"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_absent_kernels_are_no_reason_to_warn(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    activated: list[str],
    capability: tuple[int, int],
) -> None:
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "flash_attn.cute")  # its parent is what is absent
    with caplog.at_level(logging.INFO, "fastmum"):
        plan_on(monkeypatch, capability)
    assert activated == []
    assert caplog.messages == []


@pytest.mark.parametrize("capability", [(8, 0), (12, 0)])
def test_other_gpus_keep_torchs_kernels(
    monkeypatch: pytest.MonkeyPatch, activated: list[str], capability: tuple[int, int]
) -> None:
    for module in ("flash_attn_interface", "flash_attn.cute"):
        packages.install(monkeypatch, module)
    plan_on(monkeypatch, capability)
    assert activated == []


@pytest.mark.parametrize(
    ("capability", "module", "name"),
    [((9, 0), "flash_attn_interface", "FA3"), ((10, 0), "flash_attn.cute.interface", "FA4")],
)
def test_kernels_that_torch_cannot_use(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    module: str,
    name: str,
) -> None:
    """torch's own activation refuses a module without kernels: it is said, and training goes on."""
    packages.install(monkeypatch, module)
    plan_on(monkeypatch, capability)
    (message,) = caplog.messages
    assert message.startswith(f"{name} is installed but torch cannot use it (Module '{module}' does not expose")
    assert attention.current_flash_attention_impl() is None


def test_the_cpu_activates_nothing(monkeypatch: pytest.MonkeyPatch, activated: list[str]) -> None:
    packages.install(monkeypatch, "flash_attn_interface")
    BACKENDS["flash"].plan(Spans(cumulated(QUERIES), cumulated(KEYS), 5, 9), CPU)
    assert activated == []


@pytest.mark.parametrize("name", ["flash", "flash_attn", "flash_attn_4"])
def test_float32_is_not_for_flash(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(type(BACKENDS[name]), "why_not", lambda _self, _device: None)
    assert choose_backend("auto", "cuda", torch.float32).name == "sdpa"
    assert choose_backend(name, "cuda", torch.bfloat16).name == name
    with pytest.raises(AttentionError, match="computes in bfloat16 and float16, and this is float32"):
        choose_backend(name, "cuda", torch.float32)


def test_constants_are_marked_as_torch_marks_them():
    ours, torchs = (mark(lambda: 0) for mark in (constant_in_graphs, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(torchs) != {}
