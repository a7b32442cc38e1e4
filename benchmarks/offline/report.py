"""All sides of the comparison, and their table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.offline.gpus import LEAST_SECONDS, REACHED_BANDWIDTH, REACHED_PEAK, Gpu
from benchmarks.offline.kernel import Cost
from benchmarks.offline.steps import Batch, fastmum_cost, reference_cost
from fastmum.model.config import ModelConfig
from fastmum.progress import progress_bar

SIDES = ("fastmum", "reference", "reference_compiled")
# Also recorded: fastmum with `model.compile=block`, which `auto` selects and several GPUs require.
BLOCKS = "fastmum_block"
RECORD = Path(__file__).with_name("record.json")  # limits of the tests
RECORDED = ("flops", "bytes", "launches", "peak_bytes", "predicted_ms")


def measure(
    config: ModelConfig,
    batch: Batch,
    gpu: Gpu,
    mode: str = "full",
    recompute: str = "mlp",
    sides: Sequence[str] = SIDES,
) -> dict[str, Cost]:
    """The predicted cost of a step of every side.

    Args:
        config: sizes of the model.
        batch: frames of a step.
        gpu: that it runs on.
        mode: what fastmum compiles, "full" or "block".
        recompute: as `model.recompute`, "mlp" or "none".
        sides: some of `SIDES` and `BLOCKS`.
    """
    ways = {
        "fastmum": lambda: fastmum_cost(config, batch, gpu, mode, recompute),
        BLOCKS: lambda: fastmum_cost(config, batch, gpu, "block", recompute),
        "reference": lambda: reference_cost(config, batch, gpu, compiled=False),
        "reference_compiled": lambda: reference_cost(config, batch, gpu, compiled=True),
    }
    return {side: ways[side]() for side in progress_bar(sides, desc="lowering", unit="side")}


def record(found: dict[str, dict[str, dict]]) -> None:
    """Write summaries by GPU and side as the limits of the tests."""
    kept = {
        gpu: {side: {key: summary[key] for key in RECORDED} for side, summary in sides.items()}
        for gpu, sides in found.items()
    }
    RECORD.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def table(summaries: dict[str, dict], gpu: Gpu, title: str) -> str:
    """Sums of every side, and of its classes of kernels."""
    lines = [
        f"{title}, on {gpu.name}: predictions, nothing was measured",
        f"each kernel max(operations / ({REACHED_PEAK} x {gpu.peak / 1e12:.0f} T/s), bytes / ({REACHED_BANDWIDTH} x "
        f"{gpu.bandwidth / 1e12:.2f} TB/s), {1e6 * LEAST_SECONDS:.0f} us)",
        "",
        f"{'':36}{'TFLOP':>9}{'GB':>9}{'launches':>10}{'ms':>9}",
    ]
    for side, summary in summaries.items():
        lines.append(_row(side, summary))
        lines += [_row(f"  {kind}", sums) for kind, sums in summary["classes"].items()]
        lines.append(
            f"  peak memory {summary['peak_bytes'] / 1e9:.1f} GB, of which weights and moments "
            f"{summary['state_bytes'] / 1e9:.1f}; {summary['triton_kernels']} Triton kernels compiled, "
            f"{len(summary['spilled'])} spill{': ' + ', '.join(summary['spilled']) if summary['spilled'] else ''}"
        )
        lines.append("")
    return "\n".join(lines).rstrip()


def _row(name: str, sums: dict) -> str:
    return (
        f"{name:36}{sums['flops'] / 1e12:9.2f}{sums['bytes'] / 1e9:9.2f}{sums['launches']:10}"
        f"{sums['predicted_ms']:9.2f}"
    )
