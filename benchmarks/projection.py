"""Tables of the predictions of `python -m benchmarks.offline --json`, with the GPU-hours projected from them.

Nothing here is measured: a projection is the predicted time of a step, times the steps and GPUs of the paper's run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.offline.efficiency import GAP, HOST
from fastmum.engine.gpus import PAPER_RUNS, SOURCE
from fastmum.errors import FastmumError
from fastmum.files import write_atomic

PAGE = Path(__file__).parents[1] / "docs" / "predictions.md"
STEPS = 500_000  # of the paper's run (supplement)
NEEDED = ("flops", "bytes", "launches", "peak_bytes")
LEVELS = ("low", "likely", "high")
TITLES = {
    "reference": "reference, eager",
    "reference_compiled": "reference, compiled",
    "fastmum": "fastmum, `compile=full`",
    "fastmum_block": "fastmum, `compile=block`",
    "fastmum_block_fa3": "fastmum, `compile=block`, FA3",
    "fastmum_block_fa3_tma": "fastmum, `compile=block`, FA3 and products by TMA",
}
# Likely milliseconds of fastmum's step, and the compiled reference's time over it.
GOALS = {"A100-80GB": (165, 1.25), "H100-80GB": (68, 1.35), "H200-141GB": (62, None)}
_GAP, _OURS, _THEIRS = (
    f"{1e6 * each.low:g} to {1e6 * each.high:g} us" for each in (GAP, HOST["fastmum"], HOST["reference"])
)
METHOD = (
    "**Nothing here is measured.** Operations, bytes and launches of a step are counted in what PyTorch and Inductor"
    " would launch (`python -m benchmarks.offline`). A kernel takes the longer of operations / (peak x share) and bytes"
    f" / (bandwidth x share), where its class has a low, likely and high share, and a gap of {_GAP} follows. A step"
    " takes the longer of its kernels and the host's time to queue them, by assumption"
    f" {_OURS} a launch of fastmum's and {_THEIRS} of the reference's. Times are likely values, in parentheses from all"
    " shares high to all shares low; in the range of a ratio classes of both sides vary together."
)


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
        times = of_side.get("predicted_ms")
        numbers = of_side | ({f"predicted_ms.{x}": times.get(x) for x in LEVELS} if isinstance(times, dict) else {})
        for key in (*NEEDED, *(f"predicted_ms.{x}" for x in LEVELS)):
            if not isinstance(numbers.get(key), int | float):
                raise ProjectionError(f"'{path}' has no number {side}.{key}; {how}")
    return predictions


def gpu_hours(predicted_ms: float, gpus: int, steps: int = STEPS) -> float:
    """GPU-hours of a run with the predicted time per step."""
    return predicted_ms / 1e3 * steps * gpus / 3600


def projection_tables(predictions: dict[str, Any]) -> list[str]:
    """Lines of Markdown: cost of a step and of the paper's run, and where the time goes."""
    gpu = predictions.get("gpu")
    return [
        f"## Predictions, {gpu}" if gpu else "## Predictions",
        "",
        METHOD + _where(predictions),
        "",
        *_steps([predictions]),
        *_parts(predictions),
        *_shares(predictions),
    ]


def write_page(predictions: Sequence[dict[str, Any]]) -> None:
    """Write docs/predictions.md, from one prediction for each GPU."""
    write_atomic(PAGE, page(predictions))


def page(predictions: Sequence[dict[str, Any]]) -> str:
    """docs/predictions.md: steps on all GPUs, the goals, and for each GPU where the time goes and why."""
    lines = [
        "# Predictions",
        "",
        METHOD + _where({key: value for key, value in predictions[0].items() if key != "gpu"}),
        "",
        "The compiled reference has what its users would have: dense attention by cuDNN on Hopper and by FlashAttention"
        " 2 on an A100, and fused AdamW. fastmum has FlashAttention 2 across frames unless a row says otherwise. Its"
        " products are fused; on Hopper `FASTMUM_PRODUCTS=auto` takes the library's until it has measured both, which"
        " moves more bytes and launches more (docs/LOG.md, 2026-11-29). Products by TMA are an estimate: no such kernel"
        " is here.",
        "Written by `python -m benchmarks.offline --page` from what `--record` found. `--gpu h100 --recorded` prints"
        " all kinds of kernels; `--efficiency`, `--host-ms`, `--attention`, `--tma` and `--cuda-graphs` replace"
        " assumptions.",
        "",
        *_steps(predictions),
        "## Goals",
        "",
        "For the likely values; a ratio is the compiled reference's time over fastmum's.",
        "",
        "| GPU | goal | ratio | predicted | ms | ratio | longest, likely ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in predictions:
        goal, least = GOALS[each["gpu"]]
        keys = [key for key in TITLES if key in each and key.startswith("fastmum_block")]
        for key in dict.fromkeys((keys[0], keys[-1])):
            p = each[key]
            classes = sorted((-ms["likely"], name) for name, ms in _classes(p).items())[:5]
            longest = ", ".join(f"{name} {-ms:.0f}" for ms, name in classes)
            lines.append(
                f"| {each['gpu']} | {goal} | {least or ''} | {TITLES[key]} | {_range(p['predicted_ms'])} |"
                f" {_range(p['compiled_ratio'], 2)} | {longest} |"
            )
    lines.append("")
    for each in predictions:
        lines += [f"## {each['gpu']}", "", *_parts(each), *_shares(each)]
    return "\n".join(lines).rstrip() + "\n"


def _where(predictions: Mapping[str, Any]) -> str:
    where = ", ".join(
        f"{before}{predictions[key]}{unit}"
        for before, key, unit in (
            ("", "model", ""),
            ("", "frames", " frames per GPU"),
            ("", "views", " views per sequence"),
            ("", "gpu", ""),
            ("model.recompute=", "recompute", ""),
        )
        if key in predictions
    )
    return f" For {where}." if where else ""


def _steps(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    paper = PAPER_RUNS[0]
    lines = [
        "| GPU | step, predicted | GB moved | launches | peak GB | ms | compiled reference / this | GPU-hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in predictions:
        for key, title in TITLES.items():
            if not isinstance(p := each.get(key), dict):
                continue
            hours = {level: gpu_hours(ms, paper.gpus) for level, ms in p["predicted_ms"].items()}
            ratio = _range(p["compiled_ratio"], 2) if "compiled_ratio" in p else ""
            lines.append(
                f"| {each.get('gpu', '')} | {title} | {p['bytes'] / 1e9:.0f} | {p['launches']:,} |"
                f" {p['peak_bytes'] / 1e9:.1f} | {_range(p['predicted_ms'])} | {ratio} | {_range(hours)} |"
            )
    return [
        *lines,
        "",
        f"GPU-hours are a **projection**: {STEPS:,} steps on {paper.gpus} GPUs, without waiting for data, other GPUs,"
        f" checkpoints or faults. The paper's run took {paper.gpus} x {paper.gpu} x {paper.days:g} days ="
        f" {paper.gpu_hours:,.0f} GPU-hours ({SOURCE}), including all of these.",
        "",
    ]


def _classes(side: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds of a side by class of kernels."""
    times: dict[str, dict[str, float]] = {}
    for part in side["parts"]:
        cell = times.setdefault(part["class"], dict.fromkeys(LEVELS, 0.0))
        for level in LEVELS:
            cell[level] += part["ms"][level]
    return times


def _parts(predictions: Mapping[str, Any]) -> list[str]:
    """Milliseconds by class of kernels, the longest first."""
    sides = [key for key in TITLES if "parts" in predictions.get(key, {}) and key not in ("reference", "fastmum")]
    if not sides:
        return []
    times: dict[str, dict[str, dict[str, float]]] = {}
    for key in sides:
        for name, ms in _classes(predictions[key]).items():
            times.setdefault(name, {})[key] = ms
    rows = sorted(times.items(), key=lambda row: -max(cell["likely"] for cell in row[1].values()))
    rows.append(("queued by the host, beside all of this", {key: predictions[key]["host_ms"] for key in sides}))
    return [
        f"| ms | {' | '.join(TITLES[key] for key in sides)} |",
        f"|---|{'---|' * len(sides)}",
        *(
            f"| {name} | {' | '.join(_range(cells[key], 1) if key in cells else '' for key in sides)} |"
            for name, cells in rows
        ),
        "",
    ]


def _shares(predictions: Mapping[str, Any]) -> list[str]:
    shares = predictions.get("efficiencies", {})
    if not shares:
        return []
    return [
        "| share of the peak or of the bandwidth | likely (low to high) | source |",
        "|---|---|---|",
        *(f"| {name} | {_range(share, 2)} | {share['source']} |" for name, share in shares.items()),
        "",
    ]


def _range(values: Mapping[str, float], digits: int = 0) -> str:
    low, likely, high = (f"{values[level]:,.{digits}f}" for level in LEVELS)
    return f"{likely} ({low} to {high})"
