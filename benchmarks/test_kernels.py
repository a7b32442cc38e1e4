"""Each of fastmum's kernels against plain PyTorch, eager and compiled: forward, and forward with backward.

Bytes are those that any implementation moves: every input and output once, and in the backward pass the gradients and
the inputs again. GB/s are these over fastmum's time.

Legend: F frames, P patches of a frame, K visible, M masked, D width, E decoder width, L tokens of a frame, T = F * L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from benchmarks import plain
from benchmarks.duel import COMPILED, FASTMUM, REFERENCE, Duel
from benchmarks.reference.model import RopePositions
from benchmarks.reference.step import IMAGENET_MEAN, IMAGENET_STD
from benchmarks.sizes import Sizes
from fastmum import kernels
from fastmum.config.schema import OptimSection
from fastmum.engine.optimizer import build_optimizer

Function = Callable[..., Tensor | Sequence[Tensor]]
OPTIMISED_BLOCKS = 4  # of the encoder, whose weights are updated and measured
LR, DECAY, BETAS = 1e-4, 0.05, (0.9, 0.95)  # of the paper


@dataclass
class Case:
    """A kernel on inputs of a training step.

    Args:
        ours, plain: functions of the inputs.
        inputs: floating-point tensors; some get gradients.
        learnt: numbers of those that do.
        more: from these gradients, further ones that a backward pass in plain PyTorch must compute.
        flops: of the products of a forward pass.
        fixed_bytes: of other inputs than floating-point tensors.
    """

    ours: Function
    plain: Function
    inputs: list[Tensor]
    learnt: list[int] = field(default_factory=list)
    more: Callable[[list[Tensor]], list[Tensor]] = lambda gradients: []
    flops: int = 0
    fixed_bytes: int = 0


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


class Inputs:
    """Random tensors of a step's sizes, the same every time."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.device, self.dtype = sizes, sizes.device, sizes.dtype
        self.F, self.P, self.K = sizes.frames, sizes.patches, sizes.visible
        self.M = self.P - self.K
        self.D, self.E = sizes.model.embed_dim, sizes.model.decoder_embed_dim
        self.generator = torch.Generator().manual_seed(0)
        noise = torch.rand(self.F, self.P, generator=self.generator)
        shuffled = noise.argsort(1)
        self.visible, self.masked = (x.sort(1).values.to(self.device) for x in shuffled.tensor_split([self.K], dim=1))
        order = torch.cat([self.visible, self.masked], dim=1)
        self.restore = order.argsort(1)
        pixels = (self.F, sizes.image_size, sizes.image_size, 3)
        self.frames = torch.randint(0, 256, pixels, dtype=torch.uint8, generator=self.generator).to(self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal values, by default in the dtype of products."""
        return (scale * torch.randn(shape, generator=self.generator)).to(self.device, dtype or self.dtype)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Sine and cosine of the decoder's heads, (P, d)."""
        side = self.sizes.image_size // self.sizes.model.patch_size
        positions = RopePositions(self.E // self.sizes.model.decoder_num_heads).to(self.device)
        return positions(side, side)

    @property
    def pixels(self) -> tuple:
        """Arguments for the frames' values."""
        return IMAGENET_MEAN, IMAGENET_STD, self.sizes.model.patch_size


def gather_patches(t: Inputs) -> Case:
    """The encoder's input."""
    values = t.F * t.K * 3 * t.sizes.model.patch_size**2
    return Case(
        lambda: kernels.gather_patches(t.frames, t.visible, *t.pixels, t.dtype),
        lambda: plain.gather_patches(t.frames, t.visible, t.pixels[2], t.dtype),
        [],
        fixed_bytes=values + nbytes([t.visible]),
    )


def patch_loss(t: Inputs) -> Case:
    """The training loss."""
    pred = t.normal(t.F, t.M, 3 * t.sizes.model.patch_size**2)
    return Case(
        lambda pred: kernels.patch_loss(pred, t.frames, t.masked, *t.pixels),
        lambda pred: plain.patch_loss(pred, t.frames, t.masked, t.pixels[2]),
        [pred],
        [0],
        fixed_bytes=pred.numel() + nbytes([t.masked]),
    )


def scatter_tokens(t: Inputs) -> Case:
    """The decoder's input; the residual stream is float32."""
    visible, token = (t.normal(*shape, dtype=torch.float32) for shape in ((t.F, 1 + t.K, t.E), (1, 1, t.E)))
    return Case(
        lambda visible, token: kernels.scatter_tokens(visible, token, t.visible, t.P),
        lambda visible, token: plain.scatter_tokens(visible, token, t.restore),
        [visible, token],
        [0, 1],
        fixed_bytes=nbytes([t.visible]),
    )


def gather_tokens(t: Inputs) -> Case:
    """The tokens that the loss looks at."""
    return Case(
        lambda x: kernels.gather_tokens(x, t.masked),
        lambda x: plain.gather_tokens(x, t.masked),
        [t.normal(t.F, 1 + t.P, t.E, dtype=torch.float32)],
        [0],
        fixed_bytes=nbytes([t.masked]),
    )


def _rotation(t: Inputs) -> tuple[tuple, tuple[Tensor, Tensor]]:
    """Arguments of ours, and the tables expanded for every frame and head as the released model has them."""
    sin, cos = t.tables()
    positions = torch.arange(-1, t.P, device=t.device).repeat(t.F)
    heads = t.sizes.model.decoder_num_heads
    return (positions, sin, cos, heads), (sin.expand(t.F, heads, -1, -1), cos.expand(t.F, heads, -1, -1))


def _by_frames(t: Inputs, parts: Sequence[Tensor]) -> list[Tensor]:
    """Views (F, h, L, d) of (T, h, d)."""
    return [x.unflatten(0, (t.F, -1)).transpose(1, 2) for x in parts]


def rope_qk(t: Inputs) -> Case:
    """Rotary positions, out of place."""
    ours, tables = _rotation(t)

    def rotated(qkv: Tensor) -> list[Tensor]:
        out = kernels.rope_qk(qkv, *ours)
        return _by_frames(t, out.unflatten(1, (3, ours[3], -1)).unbind(1))

    return Case(
        rotated,
        lambda qkv: plain.rope_qk(qkv.unflatten(0, (t.F, -1)), *tables),
        [t.normal(t.F * (1 + t.P), 3 * t.E)],
        [0],
    )


def rotary_projection(t: Inputs) -> Case:
    """The projection to q, k and v, rotated."""
    ours, tables = _rotation(t)
    x, weight, bias = t.normal(t.F * (1 + t.P), t.E), t.normal(3 * t.E, t.E, scale=t.E**-0.5), t.normal(3 * t.E)
    return Case(
        lambda x, weight, bias: _by_frames(t, kernels.rotary_projection(x, weight, bias, *ours)),
        lambda x, weight, bias: plain.rotary_projection(x.unflatten(0, (t.F, -1)), weight, bias, *tables),
        [x, weight, bias],
        [0, 1, 2],
        flops=2 * len(x) * weight.numel(),
    )


def mlp(t: Inputs) -> Case:
    """A block's MLP; the gradient of its last bias is that of `add_norm`."""
    x, N = t.normal(t.F * (1 + t.P), t.E), 4 * t.E
    weights = t.normal(N, t.E, scale=t.E**-0.5), t.normal(N), t.normal(t.E, N, scale=N**-0.5), t.normal(t.E)
    return Case(kernels.mlp, plain.mlp, [x, *weights], [0, 1, 2, 3], flops=2 * 2 * len(x) * t.E * N)


def add_norm(t: Inputs) -> Case:
    """The end of a residual branch; its backward pass makes the gradient of the update's bias."""
    T, vector = t.F * (1 + t.P), {"dtype": torch.float32}
    x, update, update_bias = t.normal(T, t.E, **vector), t.normal(T, t.E), t.normal(t.E)
    weight, bias = t.normal(t.E, **vector), t.normal(t.E, **vector)
    return Case(
        lambda x, update, weight, bias, update_bias: kernels.add_norm(x, update, update_bias, weight, bias),
        lambda x, update, weight, bias, update_bias: plain.add_norm(x, update, weight, bias, t.dtype),
        [x, update, weight, bias, update_bias],
        [0, 1, 2, 3, 4],
        more=lambda gradients: [gradients[1].sum(0)],
    )


CASES = (gather_patches, patch_loss, scatter_tokens, gather_tokens, rope_qk, rotary_projection, mlp, add_norm)


@pytest.fixture(scope="module")
def inputs(sizes: Sizes) -> Inputs:
    return Inputs(sizes)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_forward(duel: Duel, inputs: Inputs, sizes: Sizes, make: Callable[[Inputs], Case]) -> None:
    case = make(inputs)

    def caller(function: Function) -> Callable[[], list[Tensor]]:
        @torch.no_grad()
        def run() -> list[Tensor]:
            return _listed(function(*case.inputs))

        return run

    out = nbytes(caller(case.ours)())
    fight(duel, sizes, f"{make.__name__} forward", case, caller, nbytes(case.inputs) + out + case.fixed_bytes, 1)


@pytest.mark.parametrize("make", CASES[1:], ids=lambda make: make.__name__)
def test_forward_and_backward(duel: Duel, inputs: Inputs, sizes: Sizes, make: Callable[[Inputs], Case]) -> None:
    case = make(inputs)
    for i in case.learnt:
        case.inputs[i].requires_grad_()
    learnt = [case.inputs[i] for i in case.learnt]
    weights = [inputs.normal(*x.shape, dtype=x.dtype) for x in _listed(case.ours(*case.inputs))]

    def caller(function: Function) -> Callable[[], list[Tensor]]:
        # Gradients of heads have the layout of the attention's output: ours is packed.
        own = [_packed_in_memory(x) if function is case.ours and x.ndim == 4 else x for x in weights]

        def run() -> list[Tensor]:
            out = _listed(function(*case.inputs))
            # Gradients that plain PyTorch lacks are from `more`.
            gradients = torch.autograd.grad(out, learnt, own, allow_unused=True)
            gradients = [g for g in gradients if g is not None]
            missing = len(learnt) - len(gradients)
            return [*out, *gradients, *(case.more(gradients) if missing else [])]

        return run

    least = 2 * nbytes(case.inputs) + 2 * nbytes(weights) + nbytes(learnt) + 2 * case.fixed_bytes
    fight(duel, sizes, f"{make.__name__} forward + backward", case, caller, least, 3)


def fight(
    duel: Duel, sizes: Sizes, what: str, case: Case, caller: Callable[[Function], Callable[[], list[Tensor]]],
    least: int, passes: int,
) -> None:  # fmt: skip
    """Ours against the plain form, and where sizes say so against that one compiled."""
    contestants = {REFERENCE: caller(case.plain)}
    if sizes.compiled:
        torch.compiler.reset()
        contestants[COMPILED] = caller(torch.compile(case.plain, fullgraph=True))
    contestants[FASTMUM] = caller(case.ours)
    info = {"flops": passes * case.flops} if case.flops else {}
    duel("kernels", what, contestants, bytes=least, dtype=sizes.precision, **info)


def _packed_in_memory(x: Tensor) -> Tensor:
    """(F, h, L, d) whose memory is (F, L, h, d)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _listed(out: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


class Weights(torch.nn.Module):
    """Matrices, biases and norms of some encoder blocks, with gradients."""

    def __init__(self, t: Inputs, dtype: torch.dtype) -> None:
        super().__init__()
        D = t.D
        generator = torch.Generator().manual_seed(1)
        for i in range(OPTIMISED_BLOCKS):
            layers = {f"norm{i}": torch.nn.LayerNorm(D)}
            layers |= {f"linear{i}{j}": torch.nn.Linear(*s) for j, s in enumerate([(D, 3 * D), (D, D), (D, 4 * D)])}
            for name, layer in layers.items():
                self.add_module(name, layer)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.to(t.device)
        # Rounded to the dtype of products, so that both contestants have the same.
        self.gradients = [torch.randn(p.shape, generator=generator).to(dtype).to(t.device) for p in self.parameters()]


def plain_adamw(weights: Weights, dtype: torch.dtype) -> tuple[Callable[[], None], list[Tensor]]:
    """PyTorch's AdamW, and the copies in `dtype` that it is followed by; none in float32."""
    groups = [
        {"params": [p for p in weights.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in weights.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS)
    for p, gradient in zip(weights.parameters(), weights.gradients, strict=True):
        p.grad = gradient.float()
    linear = [p for m in weights.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()]
    copies = [] if dtype == torch.float32 else [p.detach().to(dtype) for p in linear]

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        if copies:
            torch._foreach_copy_(copies, linear)

    return update, copies


def test_adamw(duel: Duel, inputs: Inputs, sizes: Sizes) -> None:
    """The update of masters and moments, and of the bfloat16 copies that products read, where there are any."""
    dtype, contestants = inputs.dtype, {}
    # On a CPU Inductor writes a loop in C++ for every tensor, which takes minutes to compile.
    compiled = sizes.compiled and sizes.device.type == "cuda"
    for name in (REFERENCE, *([COMPILED] if compiled else [])):
        weights = Weights(inputs, dtype)
        update, copies = plain_adamw(weights, dtype)
        run = torch.compile(update) if name == COMPILED else update
        contestants[name] = _then(run, lambda weights=weights: list(weights.parameters()))
    weights = Weights(inputs, dtype)
    adamw = build_optimizer(weights, OptimSection(weight_decay=DECAY, betas=list(BETAS)), dtype)
    gradient_of = {p: g.to(p.dtype) for p, g in zip(weights.parameters(), weights.gradients, strict=True)}
    masters = [weight.master for weight in adamw.weights]
    # Joined masters are copies: they are made for the check of the results, and not timed.
    joined = lambda: [weight.master for weight in adamw.weights]  # noqa: E731
    contestants[FASTMUM] = _then(lambda: adamw.step(LR, gradient_of.__getitem__), joined)
    # Masters and both moments are read and written, gradients read, copies written.
    least = 2 * 3 * nbytes(masters) + nbytes(list(gradient_of.values())) + nbytes(copies)
    duel("kernels", "adamw_", contestants, bytes=least, dtype=sizes.precision)


def _then(update: Callable[[], None], weights: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """A function that updates; its first call returns the weights, for the check."""
    checked = False

    def run() -> list[Tensor]:
        nonlocal checked
        update()
        first, checked = not checked, True
        return weights() if first else []

    return run


def test_total_norm(duel: Duel, inputs: Inputs, sizes: Sizes) -> None:
    """The norm of all gradients."""
    gradients = Weights(inputs, inputs.dtype).gradients
    contestants = {REFERENCE: lambda: get_total_norm(gradients)}
    if sizes.compiled:
        torch.compiler.reset()
        compiled = torch.compile(get_total_norm)
        contestants[COMPILED] = lambda: compiled(gradients)
    contestants[FASTMUM] = lambda: kernels.total_norm(gradients)
    duel("kernels", "total_norm", contestants, bytes=nbytes(gradients), dtype=sizes.precision)
