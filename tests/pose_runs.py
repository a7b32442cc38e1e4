"""A tiny run of relative pose, of one step."""

from pathlib import Path

from fastmum.train import main

SMALL = [
    "run.task=pose", "model.encoder=random:mum_tiny", "model.embed_dim=32", "model.depth=2", "model.num_heads=2",
    "model.head_dim=64", "data.image_size=64", "data.pairs_per_batch=4", "data.workers=1", "data.scenes.count=3",
    "data.scenes.views=6", "data.scenes.size=64", "optim.warmup_steps=1", "train.eval_batches=1", "train.threads=1",
    "train.precision=fp32",
]  # fmt: skip


def train_tiny(folder: Path, *args: str) -> Path:
    """Train it in a folder, which is returned."""
    assert main([*SMALL, "train.steps=1", f"run.dir={folder}", *args]) == 0
    return folder
