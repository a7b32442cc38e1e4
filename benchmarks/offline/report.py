"""All sides of the comparison: lowered or from the record, priced, and printed."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from benchmarks.offline.efficiency import CLASSES, GAP, HOST, LEAST, Range, efficiencies
from benchmarks.offline.gpus import GPUS
from benchmarks.offline.kernel import OURS, Cost, Kernel
from benchmarks.offline.pricing import Assumptions, everywhere
from fastmum.files import read_json, write_atomic

SIDES = ("fastmum", "reference", "reference_compiled")
# Also recorded: fastmum with `model.compile=block`, which `auto` selects and several GPUs require.
BLOCKS = "fastmum_block"
RECORD = Path(__file__).with_name("record.json")  # by compute capability; its sums are limits of the tests
STEP = {"model": "mum_vitl16", "frames": 96, "views": 12, "compile": "full", "recompute": "mlp"}  # recorded
LOWERED = {"80": "a100", "90": "h100"}  # an H200 launches what an H100 launches


def record(found: Mapping[str, Mapping[str, Cost]]) -> None:
    """Write costs by compute capability and side, one line for each row of equal kernels; other sides are kept."""
    before, kept = read_json(RECORD), {}
    for arch, costs in found.items():
        kept[arch] = before.get(arch, {})
        for side, cost in costs.items():
            rows = sorted([*kernel[1:], n] for kernel, n in cost.kernels.items())
            kept[arch][side] = cost.sums() | {"kernels": rows}
    text = re.sub(r"\[\s+([^][]+?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", json.dumps(kept, indent=1))
    write_atomic(RECORD, text + "\n")


def recorded(arch: int) -> dict[str, Cost]:
    """Costs of a step of every side, from the record."""
    return {
        side: Cost({Kernel("", *row): n for *row, n in each["kernels"]}, each["peak_bytes"], each["state_bytes"])
        for side, each in read_json(RECORD)[str(arch)].items()
    }


def hosts(costs: Mapping[str, Cost], given: Range | None = None) -> dict[str, Range]:
    """Seconds to queue a step: `given` for fastmum's, else the assumption for each launch."""
    found = {}
    for side, cost in costs.items():
        who = side.split("_")[0]
        found[side] = given if given and who == "fastmum" else HOST[who].scaled(cost.sums()["launches"])
    return found


def summary(costs: Mapping[str, Cost], assumptions: Assumptions, host: Range | None = None) -> dict[str, dict]:
    """Sums and predicted times by side, as printed in JSON: every time is a prediction, and a range."""
    queue = hosts(costs, host)
    found = {}
    for side, cost in costs.items():
        found[side] = cost.sums() | {
            "predicted_ms": _ms(assumptions.step(cost.kernels, queue[side])),
            "device_ms": _ms(assumptions.device(cost.kernels)),
            "host_ms": _ms(queue[side]),
            "parts": _parts(cost, assumptions),
            "triton_kernels": cost.sources,
            "spilled": list(cost.spilled),
        }
        if compiled := costs.get("reference_compiled"):
            pair = queue["reference_compiled"], queue[side]
            found[side]["compiled_ratio"] = assumptions.ratio(compiled.kernels, cost.kernels, pair)._asdict()
    return found


def _parts(cost: Cost, assumptions: Assumptions) -> list[dict[str, object]]:
    """Sums and times by class and kind, the longest first."""
    levels = [assumptions.parts(cost.kernels, everywhere(level)) for level in range(3)]
    members: dict[tuple[str, str], dict[Kernel, int]] = defaultdict(dict)
    for kernel, n in cost.kernels.items():
        members[assumptions.class_of(kernel), kernel.kind][kernel] = n
    parts = []
    for part in sorted(levels[1], key=lambda part: -levels[1][part]):
        sums = Cost(members[part], 0, 0).sums()
        ms = _ms(Range(*(each[part] for each in levels)))
        counts = {key: sums[key] for key in ("flops", "bytes", "launches")}
        parts.append({"class": CLASSES.get(part[0], part[0]), "kind": part[1], "ms": ms} | counts)
    return parts


def _ms(seconds: Range) -> dict[str, float]:
    return seconds.scaled(1e3)._asdict()


def header(assumptions: Assumptions, found: Mapping[str, dict]) -> dict[str, object]:
    """The assumptions behind a summary, as printed in JSON."""
    used = {part["class"] for side in found.values() for part in side["parts"]}
    shares = {CLASSES[name]: share._asdict() for name, share in assumptions.efficiencies.items()}
    return {
        "what": "predictions by formula, nothing measured",
        "gpu": assumptions.gpu.name,
        "attention": assumptions.attention,
        "tma": assumptions.tma,
        "cuda_graphs": assumptions.cuda_graphs,
        "efficiencies": {name: share for name, share in shares.items() if name in used},
    }


def predictions(gpu: str) -> dict[str, object]:
    """The recorded step on a GPU, as printed in JSON; also with faster kernels, where the GPU may have them."""
    assumptions, costs = Assumptions(GPUS[gpu], efficiencies(gpu)), recorded(GPUS[gpu].arch)
    found = summary(costs, assumptions)
    if GPUS[gpu].arch >= 90:
        pair = {side: costs[side] for side in ("reference_compiled", BLOCKS)}
        fused = any(kernel.flops and kernel.kind.startswith(OURS) for kernel in costs[BLOCKS].kernels)
        for tma in (False, True)[: 1 + fused]:
            found[f"{BLOCKS}_fa3{'_tma' * tma}"] = summary(pair, assumptions._replace(attention="fa3", tma=tma))[BLOCKS]
    return header(assumptions, found) | STEP | found


def table(found: Mapping[str, dict], assumptions: Assumptions, title: str) -> str:
    """Sums and times of every side and its classes of kernels, and the assumptions."""
    gpu = assumptions.gpu
    lines = [
        f"{title}, on {gpu.name}: predictions, nothing was measured",
        f"each kernel max(operations / (share x {gpu.peak / 1e12:.0f} T/s), bytes / (share x "
        f"{gpu.bandwidth / 1e12:.2f} TB/s), {1e6 * LEAST:.0f} us) and a gap of {_range(GAP.scaled(1e6))} us",
        "",
        f"{'':52}{'TFLOP':>9}{'GB':>9}{'launches':>10}  ms: likely (low to high)",
    ]
    for side, each in found.items():
        lines.append(_row(side, each, each["predicted_ms"]))
        for part in each["parts"]:
            lines.append(_row(f"  {part['class']}{': ' * bool(part['kind'])}{part['kind']}", part, part["ms"]))
        if "compiled_ratio" in each:
            lines.append(f"  compiled reference / this: {_range(Range(**each['compiled_ratio']), 2)}")
        lines.append(
            f"  queued by the host in {_range(Range(**each['host_ms']))} ms; peak memory "
            f"{each['peak_bytes'] / 1e9:.1f} GB, of which weights and moments {each['state_bytes'] / 1e9:.1f}"
        )
        if each["triton_kernels"]:
            spilled = each["spilled"]
            lines.append(
                f"  {each['triton_kernels']} Triton kernels compiled, {len(spilled)} spill{': ' * bool(spilled)}"
                f"{', '.join(spilled)}"
            )
        lines.append("")
    lines.append(f"{'shares of the peak or the bandwidth':40}  likely (low to high), source")
    for name, share in header(assumptions, found)["efficiencies"].items():
        lines.append(f"  {name:40}{_range(Range(share['low'], share['likely'], share['high']), 2)}, {share['source']}")
    return "\n".join(lines)


def _row(name: str, sums: dict, ms: dict) -> str:
    return f"{name:52}{sums['flops'] / 1e12:9.2f}{sums['bytes'] / 1e9:9.2f}{sums['launches']:10}  {_range(Range(**ms))}"


def _range(values: Range, digits: int = 1) -> str:
    low, likely, high = (f"{value:.{digits}f}" for value in values)
    return f"{likely} ({low} to {high})"
