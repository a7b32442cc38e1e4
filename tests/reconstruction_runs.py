"""A tiny run of reconstruction, of one step."""

from pathlib import Path

from fastmum.train import main

TINY_RUN = [
    "run.task=reconstruction", "model.encoder=random:mum_tiny", "model.embed_dim=32", "model.pairs=2",
    "model.num_heads=2", "model.taps=[0,0,1,1]", "model.dpt_features=16", "model.dpt_levels=[16,16,16,16]",
    "model.camera_heads=4", "model.camera_blocks=1", "data.image_size=64", "data.views=[2,4]", "data.min_frames=4",
    "data.frames_per_batch=4", "data.workers=1", "data.scenes.count=3", "data.scenes.views=6", "data.scenes.size=64",
    "optim.warmup_steps=1", "train.steps=1", "train.eval_batches=1", "train.threads=1", "train.precision=fp32",
]  # fmt: skip


def train_tiny(folder: Path, *args: str) -> Path:
    """Train it in a folder, which is returned."""
    assert main([*TINY_RUN, f"run.dir={folder}", *args]) == 0
    return folder
