"""What tests of stored frames share: the content of a manifest's files, and decoded frames of a run."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from fastmum.data import staging
from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import read_file
from fastmum.data.loader import Loader
from fastmum.data.manifest import Manifest
from fastmum.data.pack import Settings
from fastmum.data.plan import StepPlanner

SMALL = Settings(shard_gb=2e-5)  # a few sequences of a few images


def contents(manifest):
    return [read_file(file) for file in manifest.files(np.arange(manifest.num_frames))]


def stage(manifest, scratch):
    """Copy all files of a manifest to a stage, by four threads, and return the copies."""
    staging.start(str(scratch), 1)
    files = Manifest(manifest).files(np.arange(24))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: [staging._stage.copy(file.place) for file in files], range(4)))
    return [staging._stage.read(file.place) for file in files]


def batches(manifests, count=3, workers=2):
    """Decoded frames of the first steps of a run."""
    planner = StepPlanner(manifests, frames_per_gpu=8, views=(2, 4), seed=3)
    loader = Loader(make_decoder("pillow", 32), manifests, workers)
    found = [batch.frames for batch in loader.batches(planner.plan(step, 0) for step in range(count))]
    assert not loader.faults.counts
    return torch.stack(found)
