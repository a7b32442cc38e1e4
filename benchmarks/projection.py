"""Tables of the predictions of `python -m benchmarks.offline --json`, and the GPU-hours projected from them.

Nothing here is measured: a projection is the predicted time of a step, times the steps and GPUs of the paper's run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmum.engine.gpus import PAPER_RUNS, SOURCE
from fastmum.errors import FastmumError

STEPS = 500_000  # of the paper's run (supplement)
NEEDED = ("flops", "bytes", "launches", "peak_bytes", "predicted_ms")
TITLES = {
    "fastmum": "fastmum",
    "fastmum_block": "fastmum, blocks compiled",
    "reference": "reference",
    "reference_compiled": "reference, compiled",
}


class ProjectionError(FastmumError):
    """A file without predictions."""


def read_predictions(path: Path) -> dict[str, Any]:
    """Read the output of `python -m benchmarks.offline --json`.

    Raises:
        ProjectionError: the file is missing or has another format.
    """
    how = "write it with python -m benchmarks.offline --json"
    try:
        predictions = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProjectionError(f"'{path}' cannot be read ({error.strerror}); {how}") from None
    except ValueError as error:
        raise ProjectionError(f"'{path}' is not JSON ({error}); {how}") from None
    for side in ("fastmum", "reference"):
        of_side = predictions.get(side) if isinstance(predictions, dict) else None
        if not isinstance(of_side, dict):
            raise ProjectionError(f"'{path}' has no predictions of '{side}'; {how}")
        for key in NEEDED:
            if not isinstance(of_side.get(key), int | float):
                raise ProjectionError(f"'{path}' has no number {side}.{key}; {how}")
    return predictions


def gpu_hours(predicted_ms: float, gpus: int, steps: int = STEPS) -> float:
    """GPU-hours of a run with the predicted time per step."""
    return predicted_ms / 1e3 * steps * gpus / 3600


def projection_tables(predictions: dict[str, Any]) -> list[str]:
    """Lines of Markdown: cost of a step, and of the paper's run."""
    sides = {key: title for key, title in TITLES.items() if isinstance(predictions.get(key), dict)}
    where = ", ".join(
        f"{before}{predictions[key]}{unit}"
        for before, key, unit in (
            ("", "model", ""),
            ("", "frames", " frames per GPU"),
            ("", "views", " views per sequence"),
            ("", "gpu", ""),
            ("model.compile=", "compile", " (fastmum; full on one GPU, block on several)"),
            ("model.recompute=", "recompute", ""),
        )
        if key in predictions
    )
    lines = [
        f"## Predictions, {predictions['gpu']}" if "gpu" in predictions else "## Predictions",
        "",
        "Not measured. Operations, bytes and launches of a step are counted from the kernels that PyTorch and Inductor"
        " would launch (`python -m benchmarks.offline`); every kernel takes its roofline time."
        + (f" For {where}." if where else ""),
        "",
        "| step, predicted | TFLOP | GB moved | launches | peak GB | ms | reference / this |",
        "|---|---|---|---|---|---|---|",
    ]
    of_reference = predictions["reference"]["predicted_ms"]
    for key, title in sides.items():
        p = predictions[key]
        lines.append(
            f"| {title} | {p['flops'] / 1e12:.2f} | {p['bytes'] / 1e9:.1f} | {p['launches']:,} | "
            f"{p['peak_bytes'] / 1e9:.1f} | {p['predicted_ms']:.1f} | {of_reference / p['predicted_ms']:.2f} |"
        )
    paper = PAPER_RUNS[0]
    lines += [
        "",
        f"A **projection** from these: {STEPS:,} steps on {paper.gpus} GPUs, without waiting for data, other GPUs,"
        f" checkpoints or faults. The paper's run took {paper.gpus} x {paper.gpu} x {paper.days:g} days ="
        f" {paper.gpu_hours:,.0f} GPU-hours ({SOURCE}), including all of these.",
        "",
        "| run, projected | GPU-hours | days | share of the paper's |",
        "|---|---|---|---|",
    ]
    for key, title in sides.items():
        hours = gpu_hours(predictions[key]["predicted_ms"], paper.gpus)
        days = hours / paper.gpus / 24
        lines.append(f"| {title} | {hours:,.0f} | {days:.2f} | {hours / paper.gpu_hours:.0%} |")
    lines.append(f"| the paper's, as published | {paper.gpu_hours:,.0f} | {paper.days:.2f} | 100% |")
    return [*lines, ""]
