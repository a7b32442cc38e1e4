"""Hooks, parametrizations and replaced layers take effect, compiled or not, and images have gradients.

The truth is the plain reference model with the same alteration.
"""

import pytest
import torch
from released import difference
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize

from benchmarks.reference.model import ReferenceMuM
from fastmum import MuM
from fastmum.model.compile import compile_model
from fastmum.model.encoder import Encoder
from fastmum.model.inputs import seeded_noise

LINEAR, NORM = "blocks.0.attn.qkv", "decoder_frame_blocks.0.norm1"


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


class Adapter(nn.Module):
    """A layer with a small one next to it, as LoRA has, and no `weight`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def replace(layer: nn.Module, by: nn.Module, model: nn.Module, name: str) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, by)


def weight_norm(layer: nn.Module, *_: object) -> None:
    with torch.no_grad():
        nn.utils.weight_norm(layer).weight_g.mul_(1.5)


def patch_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: 1.5 * forward(x)


def scaled(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else 1.5 * grad for grad in grads)


ALTERATIONS = {
    "forward hook": lambda layer, *_: layer.register_forward_hook(lambda _module, _args, out: 1.5 * out),
    "pre-hook": lambda layer, *_: layer.register_forward_pre_hook(lambda _module, args: (1.5 * args[0],)),
    "backward hook": lambda layer, *_: layer.register_full_backward_hook(lambda _module, grads, _outer: scaled(grads)),
    "backward pre-hook": lambda layer, *_: layer.register_full_backward_pre_hook(lambda _module, grads: scaled(grads)),
    "parametrization": lambda layer, *_: parametrize.register_parametrization(layer, "weight", Scaled()),
    "patched forward": lambda layer, *_: patch_forward(layer),
}
ON_MATRICES = {
    "spectral norm": lambda layer, *_: parametrizations.spectral_norm(layer),
    "weight norm": weight_norm,
    "adapter": lambda layer, model, name: replace(layer, Adapter(layer), model, name),
}
ON_NORMS = {
    "epsilon": lambda layer, *_: setattr(layer, "eps", 0.1),
    "without bias": lambda layer, *at: replace(layer, nn.LayerNorm(layer.normalized_shape, bias=False), *at),
    "RMSNorm": lambda layer, *at: replace(layer, nn.RMSNorm(layer.normalized_shape), *at),
}


@pytest.fixture
def pair(tiny) -> tuple[MuM, ReferenceMuM]:
    """A model whose layers all matter, and the reference with the same weights."""
    reference = ReferenceMuM(32, 2, 2, 32, 2, 2)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    reference.load_state_dict(tiny.state_dict())
    return tiny, reference


IMAGES = torch.randn(2, 2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
NOISE = seeded_noise(0, 0, 0, 4, 6)


def results(model: nn.Module, images: Tensor = IMAGES) -> dict[str, Tensor]:
    """Loss, gradients and features."""
    if isinstance(model, MuM):
        loss = model(images.flatten(0, 1), [2, 2], 0.5, NOISE).loss
    else:
        loss = model(images, 0.5, NOISE).loss
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted |= {"images": images} if images.requires_grad else {}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    features = model.forward_features(images.flatten(0, 1))["x_norm_patchtokens"].detach()
    return {"loss": loss.detach(), "features": features} | dict(zip(wanted, grads, strict=True))


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: str = "") -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert difference(ours[name], value) < 2e-5 or (ours[name] - value).norm() < 1e-6, f"{where}: {name}"


def layers_of(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    return sorted(name for name, module in model.named_modules() if isinstance(module, kinds))


def alter(models: tuple[nn.Module, ...], alteration, names: list[str]) -> None:
    for model in models:
        torch.manual_seed(1)
        for name in names:
            alteration(model.get_submodule(name), model, name)


ALL = nn.Linear, nn.LayerNorm, nn.Conv2d
CASES = [(name, function, ALL) for name, function in ALTERATIONS.items()]
CASES += [(name, function, (nn.Linear,)) for name, function in ON_MATRICES.items()]
CASES += [(name, function, (nn.LayerNorm,)) for name, function in ON_NORMS.items()]


@pytest.mark.parametrize(("alteration", "kinds"), [pytest.param(f, kinds, id=name) for name, f, kinds in CASES])
def test_alterations_of_all_layers(pair, alteration, kinds):
    before = results(pair[0])
    alter(pair, alteration, layers_of(pair[0], *kinds))
    ours, theirs = map(results, pair)
    assert_equal(ours, theirs)
    assert any(difference(ours[name], before[name]) > 1e-3 for name in ours.keys() & before.keys())


def test_a_hook_of_each_layer(pair):
    """Called once by a forward pass, and nothing else changes."""
    calls = []
    for name in layers_of(pair[0], *ALL):
        handles = [m.get_submodule(name).register_forward_hook(lambda _m, _a, out: 1.5 * out) for m in pair]
        handles.append(pair[0].get_submodule(name).register_forward_hook(lambda *_, n=name: calls.append(n)))
        assert_equal(*map(results, pair), name)
        assert calls.count(name) == 2 - ("decoder" in name), name  # features do not need the decoder
        for handle in handles:
            handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "full"])
def test_hooks_of_a_compiled_model(pair, monkeypatch, mode):
    """They take effect also after compilation; without them, the compiled regions run, one graph each."""
    monkeypatch.setattr("fastmum.model.compile.has_cpp_compiler", lambda: True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_model(pair[0], mode, steps=1, backend=counter)
    assert_equal(*map(results, pair))
    graphs = counter.frame_count
    for kind in ("forward hook", "backward hook"):
        handles = [ALTERATIONS[kind](model.get_submodule(name)) for name in (LINEAR, NORM) for model in pair]
        assert_equal(*map(results, pair), kind)
        for handle in handles:
            handle.remove()
    assert_equal(*map(results, pair))
    assert counter.frame_count == graphs


@pytest.mark.slow
def test_hooks_inside_a_compiled_encoder(tiny):
    torch._dynamo.reset()
    encoder, counter = Encoder(tiny.config).eval(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(encoder, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(IMAGES[0]), encoder(IMAGES[0]))
    assert counter.frame_count == 1
    alter((encoder,), ALTERATIONS["forward hook"], [LINEAR, "blocks.1.norm1", "patch_embed.proj"])
    torch.testing.assert_close(compiled(IMAGES[0]), encoder(IMAGES[0]))
    assert counter.frame_count == 2


@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_of_images(pair, hooked):
    if hooked:
        alter(pair, ALTERATIONS["forward hook"], ["patch_embed.proj"])
    images = IMAGES.clone().requires_grad_()
    ours, theirs = (results(model, images) for model in pair)
    assert_equal(ours, theirs)
    x = [images[0].detach().clone().requires_grad_() for _ in pair]
    for leaf, model in zip(x, pair, strict=True):
        model.forward_features(leaf)["x_norm_clstoken"].square().sum().backward()
    assert difference(x[0].grad, x[1].grad) < 1e-5


@pytest.mark.parametrize("what", ["positions", "parameters", "autocast"])
def test_hooks_in_bfloat16(tiny, what):
    """q and k are rounded also where qkv is called, and layers get the dtype that they multiply in."""
    tiny.rope_embed.to(torch.bfloat16 if what == "positions" else torch.float32)
    tiny.to(torch.bfloat16 if what == "parameters" else torch.float32)
    outputs = []
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        for _ in range(2):
            outputs.append(tiny(IMAGES.flatten(0, 1), [2, 2], 0.5, NOISE).pred.float())
            alter((tiny,), lambda layer, *_: layer.register_forward_hook(lambda *_: None), layers_of(tiny, *ALL))
    assert difference(outputs[1], outputs[0]) < (1e-6 if what == "positions" else 0.01)
