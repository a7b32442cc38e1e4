"""States to save and load."""

import torch

from fastmum.engine.checkpoint import load_newest

CONFIG = {"depth": 2, "embed_dim": 32}
VALUES = {"model_config": CONFIG, "frames_per_step": 96}
# Rows that two and four ranks divide, rows that they do not divide, and fewer rows than ranks.
SHAPES = {"even.weight": (8, 6), "uneven.weight": (7, 5), "token": (1, 1, 6), "conv.weight": (8, 3, 4, 4), "bias": (3,)}


def full_state(seed):
    """Plain tensors, different for every seed; the convolution's are channels last."""
    random = torch.Generator().manual_seed(seed)
    state = {
        f"{kind}.{name}": torch.randn(shape, generator=random)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for name, shape in SHAPES.items()
    }
    for name in (name for name in state if name.endswith("conv.weight")):
        state[name] = state[name].to(memory_format=torch.channels_last)
    state["optimizer.step"] = torch.tensor(float(seed))
    state["meter.losses"] = torch.randn(25, generator=random, dtype=torch.float64)
    return state


def assert_same(state, seed):
    torch.testing.assert_close(state, full_state(seed), rtol=0, atol=0)


def assert_newest(path, seed):
    """The newest checkpoint holds `full_state`; returns its manifest."""
    state = full_state(99)
    manifest = load_newest(path, state, CONFIG)
    assert_same(state, seed)
    return manifest
