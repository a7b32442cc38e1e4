"""CPU time to decode an image to 256 pixels: the decoders and the reference's pipeline."""

import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import photographs
from benchmarks.duel import Duel, rotated
from benchmarks.reference import image_loader
from benchmarks.reference.step import IMAGENET_MEAN, IMAGENET_STD
from benchmarks.results import FASTMUM, REFERENCE
from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import crop_box, draw_crops
from fastmum.data.loader import Loader
from fastmum.data.manifest import Manifests, SequenceRecord, write_manifest
from fastmum.data.plan import StepPlan

SIZE, BATCH, WORKERS, ROUNDS = 256, 96, 2, 2
HAS_DALI = importlib.util.find_spec("nvidia.dali") is not None
DECODERS = ["pillow", *(["dali_cpu"] * HAS_DALI), *(["dali"] * (HAS_DALI and torch.cuda.is_available()))]


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(),
    reason="no /proc, from which CPU time of worker processes is read",
)


@pytest.fixture(scope="module", params=["320 pixels", "1920 x 1080", "3840 x 2160"])
def files(request, tmp_path_factory, quick) -> list[Path]:
    if quick and request.param != "320 pixels":
        pytest.skip("--quick: large photographs take a minute")
    folder = tmp_path_factory.mktemp("photographs")
    match request.param:
        case "320 pixels":
            return photographs.small_files(folder, count=192) * 2
        case "1920 x 1080":
            return photographs.large_files(folder, (1920, 1080), count=24) * 4
    return photographs.large_files(folder, (3840, 2160), count=8) * 12


def test_cpu_time_of_an_image(duel: Duel, files: list[Path], tmp_path: Path, request):
    """Every round decodes the same files with each; the first round warms up."""
    plans = whole_batches(len(files))
    reference = image_loader.loader(files, SIZE, BATCH, WORKERS)
    manifests = open_manifest(tmp_path, files)
    runs = {REFERENCE: lambda: sum(map(len, reference))}
    for name in DECODERS:
        loader = Loader(make_decoder(name, SIZE), manifests, WORKERS)
        for plan in plans:
            agree_with_reference(loader, files, plan)
        runs[name] = lambda loader=loader: sum(len(batch.frames) for batch in loader.batches(plans))
    times = {name: [] for name in runs}
    for number in range(-1, ROUNDS):
        for name in rotated(list(runs), max(number, 0)):
            start = cpu_seconds(reference)
            frames = runs[name]()
            if number >= 0:
                times[name].append((cpu_seconds(reference) - start) / frames)
    size = request.node.callspec.params["files"]
    for name in DECODERS:
        what = f"CPU time of an image, {size}, {name}"
        duel.record("loader", what, {REFERENCE: times[REFERENCE], FASTMUM: times[name]})


def whole_batches(num_files: int) -> list[StepPlan]:
    """Plans over all files in order."""
    rng = np.random.default_rng(0)
    return [
        StepPlan(
            np.arange(begin, begin + BATCH),
            np.array([BATCH]),
            draw_crops(rng, BATCH, (0.2, 1.0), (3 / 4, 4 / 3)),
            rng.random(BATCH) < 0.5,
        )
        for begin in range(0, num_files, BATCH)
    ]


def open_manifest(folder: Path, files: list[Path]) -> Manifests:
    links = [folder / f"{i}.jpg" for i in range(len(files))]
    for link, file in zip(links, files, strict=True):
        link.symlink_to(file)
    record = SequenceRecord("all", [link.name for link in links])
    write_manifest(folder / "files.arrow", [record], dataset="photographs", root=folder, metadata={})
    return Manifests([folder / "files.arrow"])


def agree_with_reference(loader: Loader, files: list[Path], plan: StepPlan) -> None:
    """Frames differ by at most 2 grey levels on average."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    for row, frame, crop, flip in zip(plan.rows, loader.load(plan).frames, plan.crops, plan.flips, strict=True):
        with Image.open(files[row]) as image:
            theirs = image_loader.transform(image.convert("RGB"), crop_box(crop, *image.size), flip, SIZE)
        theirs = ((theirs * std + mean) * 255).permute(1, 2, 0)
        assert (frame.cpu() - theirs).abs().mean() < 2, files[row]


def cpu_seconds(reference) -> float:
    """CPU time of this process and of the reference's worker processes."""
    workers = getattr(reference._iterator, "_workers", [])
    ticks = sum(
        sum(map(int, Path(f"/proc/{w.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) for w in workers
    )
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
