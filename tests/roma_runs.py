"""Tiny runs of matching."""

from pathlib import Path

from fastmum.train import main

TINY = [
    "run.task=roma", "model.encoder=random:mum_tiny", "model.vgg=[8,8,16,16]", "model.vgg_layers=[1,1,1,1]",
    "model.projected=[16,16,8,8,4]", "model.displacement=[8,8,4,4,4]", "model.radius=[2,1,1,0,0]", "model.gp_dim=16",
    "model.num_heads=2", "model.blocks=1", "model.anchors=8", "model.hidden_blocks=1", "data.image_size=64",
    "data.pairs_per_batch=2", "data.workers=1", "data.shift=4", "data.scenes.count=3", "data.scenes.views=6",
    "data.scenes.size=64", "train.eval_batches=2", "train.log_every=1", "train.threads=1", "train.precision=fp32",
]  # fmt: skip


def train_tiny(folder: Path, *args: str) -> Path:
    """Train one step in a folder, which is returned."""
    assert main([*TINY, "train.steps=1", f"run.dir={folder}", *args]) == 0
    return folder
