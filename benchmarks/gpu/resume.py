"""40 steps of the trainer on rendered scenes, with checkpoints; again from step 20: are the losses the same?

Further words are settings.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.measure import this_device
from benchmarks.gpu.record import Record, stage_main
from benchmarks.gpu.stages import ROOT

STEPS, SMALL_STEPS = 40, 4
TOLERANCE = 1e-2  # relative, of losses after gradients that were added in another order
FULL = ["--config", "mum_vitl16", "data.scenes.count=8", "data.held_out=0.2", "optim.warmup_steps=100"]
SMALL = [
    "model.preset=mum_tiny", "model.depth=1", "model.decoder_depth=2", "data.image_size=32", "data.views=[2,3]",
    "data.frames_per_batch=6", "data.scenes.count=4", "data.scenes.views=4", "data.scenes.size=32", "data.held_out=0.3",
    "train.precision=fp32", "optim.warmup_steps=2",
]  # fmt: skip


def measure(record: Record, small: bool, words: list[str]) -> bool:
    """Train twice; False if losses differ, or a run fails."""
    steps, folder = (SMALL_STEPS if small else STEPS), record.file.with_suffix("")
    half = steps // 2
    settings = [
        *(SMALL if small else FULL), f"train.device={this_device().type}", f"train.steps={steps}", "train.log_every=1",
        f"train.checkpoint_every={half}", "train.eval_batches=1", *words,
    ]  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
    first = train(folder / "whole", [*settings, "train.resume=never"])
    record.row(run="whole", steps=f"1 to {steps}", first_loss=first[1]["loss"], last_loss=first[steps]["loss"])
    for name in ("frames_per_s", "mfu", "data_wait"):
        if first[steps].get(name) is not None:
            record.row(metric=name, value=float(first[steps][name]))
    checkpoint = next((folder / "whole" / "checkpoints").glob(f"step_*{half}"))
    second = train(folder / "resumed", [*settings, f"train.resume={checkpoint}"])
    for run in ("whole", "resumed"):
        shutil.rmtree(folder / run / "checkpoints")  # 5 GB each at the paper's size
    pairs = [(first[i]["loss"], second[i]["loss"]) for i in range(half + 1, steps + 1)]
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    record.row(run="resumed", steps=f"{half + 1} to {steps}", first_loss=pairs[0][1], last_loss=pairs[-1][1])
    same = "the same" if worst == 0 else f"within {worst:.1e}"
    record.headline = f"loss {first[1]['loss']:.4f} to {first[steps]['loss']:.4f}; after resuming {same}"
    return worst <= TOLERANCE


def train(folder: Path, settings: list[str]) -> dict[int, dict[str, float]]:
    """Run the trainer in a process; its metrics by step."""
    words = [sys.executable, "-m", "fastmum.train", *settings, f"run.dir={folder}"]
    subprocess.run(words, cwd=ROOT, check=True)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["step"]: entry for entry in map(json.loads, lines)}


if __name__ == "__main__":
    sys.exit(stage_main(__doc__, measure))
