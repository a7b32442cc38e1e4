"""The choice between fused kernels and library products (`FASTMUM_PRODUCTS=auto`), measured at the start of a run."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmum.errors import first_line
from fastmum.kernels.dispatch import triton, use_triton
from fastmum.kernels.feedforward import _linear_gelu, _linear_gelu_backward
from fastmum.kernels.matmul import SIXTEEN_BITS, Key, measured, products_choice
from fastmum.kernels.projection import _rotary_linear
from fastmum.measured import measured_times, milliseconds
from fastmum.model.config import MLP_RATIO, ModelConfig

log = logging.getLogger(__name__)
CANDIDATES = {"fused": True, "library": False}
TOLERANCE = 0.02  # of the relative distance of their results; bfloat16 rounds to 0.004


class Call(NamedTuple):
    """A call of an operator, and what `measured` knows it by; the first tensor is (T, ...)."""

    key: Key
    operator: Callable
    args: tuple

    def __call__(self) -> Sequence[Tensor]:
        """The results."""
        results = self.operator(*self.args)
        return (results,) if isinstance(results, Tensor) else results


def choose_products(
    config: ModelConfig, frames: int, patches: int, visible: int, recompute: str, device: torch.device,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Measure the products of a training step, if there is a choice, and log what is chosen in one line.

    It must run before the model is compiled. Runs that must repeat bit for bit measure nothing.

    Args:
        config, frames, patches, visible: sizes of the model and of a batch.
        recompute: as in `MuM.set_recompute`.
        device, dtype: of the products.
    """
    if device.type != "cuda" or dtype not in SIXTEEN_BITS or products_choice() != "auto":
        return
    if torch.are_deterministic_algorithms_enabled() or not use_triton(torch.empty(0, dtype=dtype, device=device)):
        return
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return
    choose(calls_of(config, frames, patches, visible, recompute, device, dtype), torch.cuda.get_device_name(device))


def choose(calls: Iterator[Call], device: str) -> None:
    """Set `measured` for every call, by times from the cache or measured on the device of this name."""
    said = []
    for call in calls:
        (operation, rows, columns, dtype), tokens = call.key, len(call.args[0])
        what = repr(
            (device, str(torch.__version__), triton.__version__, operation, (tokens, rows, columns), str(dtype))
        )
        times = measured_times("products", what, list(CANDIDATES), lambda call=call: _times(call))  # type: ignore[misc]
        fastest = min(times, key=lambda name: times[name])
        measured[call.key] = CANDIDATES[fastest]
        others = "".join(f", {name} {ms:.3f}" for name, ms in times.items())
        said.append(f"{operation} {rows}x{columns} {fastest}{others}")
    log.info("products, faster one and ms: %s", "; ".join(said))


def _times(call: Call) -> dict[str, float]:
    """Milliseconds of the candidates; only the library's if the fused kernel fails or has other results."""
    times, results = {}, {}
    try:
        for name in ("library", "fused"):
            measured[call.key] = CANDIDATES[name]
            try:
                results[name] = [x.float() for x in call() if x.numel()]
                if name == "fused":
                    _check(results)
                times[name] = milliseconds(call)  # type: ignore[arg-type]  # mypy takes it for a plain tuple
            except Exception as error:  # a compiler may raise anything; the run itself needs the library
                if name == "library":
                    raise
                log.warning(
                    "%s: the library's product is used, as the fused kernel fails: %s", call.key[0], first_line(error)
                )
    finally:
        del measured[call.key]
    return times


def _check(results: dict[str, list[Tensor]]) -> None:
    """RuntimeError if the results of the candidates differ."""
    for x, y in zip(results["fused"], results["library"], strict=True):
        distance = float((x - y).norm() / y.norm())
        if not distance <= TOLERANCE:  # NaN is not
            raise RuntimeError(f"its result is at a relative distance of {distance:.2g} from the library's")


def calls_of(
    config: ModelConfig, frames: int, patches: int, visible: int, recompute: str, device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Call]:  # fmt: skip
    """The operators of a training step with random tensors of its sizes; arguments as in `choose_products`."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def call(operation: str, operator: Callable, weight: Tensor, *args: object) -> Call:
        return Call((operation, *weight.shape, dtype), operator, args)  # type: ignore[arg-type]

    encoder = config.embed_dim, config.num_heads, frames * (1 + visible), ("qkv",)
    decoder = config.decoder_embed_dim, config.decoder_num_heads, frames * (1 + patches), ("qkv", "q", "kv")
    for (D, heads, T, projections), again in ((encoder, "act"), (decoder, "mlp")):
        again = again if recompute == "mlp" else "none"
        N, half = MLP_RATIO * D, D // heads // 2
        x, weight1, bias1, weight2 = random(T, D), random(N, D) * D**-0.5, random(N), random(D, N) * D**-0.5
        yield call("linear_gelu", _linear_gelu, weight1, x, weight1, bias1, again != "mlp")
        hidden, first = (None, (x, weight1, bias1)) if again == "mlp" else (random(T, N), (None, None, None))
        grad = random(T, D), weight2, hidden, *first, again != "none"
        yield call(f"linear_gelu_backward {again}", _linear_gelu_backward, weight2, *grad)
        positions = torch.arange(T, device=device) % patches
        sin, cos = (table.float() for table in (random(patches, half), random(patches, half)))
        for parts in projections:
            weight, bias = random(len(parts) * D, D) * D**-0.5, random(len(parts) * D)
            rows = frames * (patches - visible) if parts == "q" else T  # of the last block: masked patches
            rotated = heads * len(parts.removesuffix("v"))
            yield call(
                "rotary_linear",
                _rotary_linear,
                weight,
                x[:rows],
                weight,
                bias,
                positions[:rows],
                sin,
                cos,
                rotated,
                True,
            )
