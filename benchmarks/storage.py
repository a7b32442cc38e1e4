"""Images from shards: against loose files, WebDataset and torchvision's ImageFolder, from S3, and 20 M of them.

`python -m benchmarks.storage [PART ...] [--images 400] [--size 500x375] [--rounds 3]`, by default all but workers:

    loaders   decoded 256 px crops a CPU-second, in one process, with a warm page cache (or --cold)
    calls     system calls that open or look up files, per image (needs strace)
    s3        a tiny run from an S3 server on this machine with 20 ms more latency, against the same run from disk
    open      opening manifests of 20 M images in shards (share 0.05 of them with --quick)
    workers   building 400 synthetic COLMAP models (20 with --quick) by 1 and 2 processes, and by Ray of 1 and 2 CPUs

WebDataset and ImageFolder crop and resize like fastmum, bicubic, in this process: workers would add CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import photographs
from benchmarks.duel import rotated
from benchmarks.large_manifests import write_large_manifests
from benchmarks.synthetic_scene import draw_scene, write_binary_model
from fastmum.data.build import build
from fastmum.data.decode import make_decoder
from fastmum.data.decode.image import draw_crops
from fastmum.data.loader import Loader
from fastmum.data.manifest import Manifests
from fastmum.data.pack import Settings, pack
from fastmum.data.plan import StepPlan
from fastmum.data.spread import cluster

SIZE, BATCH, FOLDERS = 256, 96, 8
LATENCY_S, PORT = 0.02, 5599
CALLS = "open,openat,stat,lstat,newfstatat,statx"


def write_images(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """JPEG photographs in folders, as ImageFolder reads them; returns the folder."""
    files = photographs.large_files(folder, size, count)
    for i, file in enumerate(files):
        target = folder / "raw" / f"class_{i % FOLDERS}" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    return folder / "raw"


def manifests_of(folder: Path, raw: Path) -> dict[str, Manifests]:
    """The loose images and their shards."""
    build("folder", raw, folder / "loose.arrow")
    pack(folder / "loose.arrow", folder / "shards", Settings(shard_gb=0.02))
    return {"loose": Manifests([folder / "loose.arrow"]), "shards": Manifests([folder / "shards/loose.arrow"])}


def plans(count: int, seed: int = 0) -> list[StepPlan]:
    """Plans that draw all images in random order, with random crops and flips."""
    rng = np.random.default_rng(seed)
    return [
        StepPlan(
            rows, np.array([len(rows)]), draw_crops(rng, len(rows), (0.2, 1.0), (3 / 4, 4 / 3)),
            rng.random(len(rows)) < 0.5,
        )
        for rows in np.array_split(rng.permutation(count), -(-count // BATCH))
    ]  # fmt: skip


def loaders(folder: Path, raw: Path, count: int) -> dict[str, Callable[[], int]]:
    """Functions that decode all images once, and return their number."""
    import torch
    import webdataset
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    found: dict[str, Callable[[], int]] = {}
    for name, manifests in manifests_of(folder, raw).items():
        loader = Loader(make_decoder("pillow", SIZE), manifests, workers=1)
        found[f"fastmum, {name}"] = lambda loader=loader: sum(len(b.frames) for b in loader.batches(plans(count)))
    shards = [str(file) for file in sorted((folder / "shards").glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).decode("pilrgb").to_tuple("jpg")
    samples = samples.map_tuple(transform).batched(BATCH)
    found["WebDataset"] = lambda: sum(len(batch[0]) for batch in samples)
    images = torch.utils.data.DataLoader(ImageFolder(str(raw), transform), BATCH, shuffle=True)
    found["ImageFolder, DataLoader"] = lambda: sum(len(batch[0]) for batch in images)
    return found


def drop(folder: Path) -> None:
    """Remove files from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare_loaders(folder: Path, count: int, size: tuple[int, int], rounds: int, cold: bool) -> None:
    """Print images a CPU-second of each loader: median of the rounds, in turn, after one that warms up."""
    import torch

    torch.set_num_threads(1)
    runs = loaders(folder, write_images(folder, count, size), count)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-1, rounds):
        for name in rotated(list(runs), max(number, 0)):
            if cold:
                drop(folder)
            start = time.process_time()
            images = runs[name]()
            assert images == count, (name, images)
            if number >= 0:
                rates[name].append(images / (time.process_time() - start))
    cache = "dropped page cache" if cold else "warm page cache"
    print(f"\n{count} images of {size[0]} x {size[1]} pixels, {cache}, {SIZE} px crops a CPU-second, {rounds} rounds")
    ours = rates["fastmum, shards"]
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        print(f"  {name:<26}{statistics.median(values):8.1f}   shards / this: {ratio:.2f}")


READ = """
import sys
import numpy as np
from fastmum.data.decode.image import read_file
from fastmum.data.manifest import Manifest
manifest = Manifest(sys.argv[1])
rows = np.random.default_rng(0).integers(0, manifest.num_frames, int(sys.argv[2]))
for file in manifest.files(rows):
    read_file(file)
"""


def count_calls(folder: Path, count: int) -> None:
    """Print system calls per image that is read in random order, beyond those of a process that reads none."""
    manifests = manifests_of(folder, write_images(folder, count, (64, 64)))
    per_image = {}
    for name, opened in manifests.items():
        totals = []
        for images in (0, 20 * count):
            log = folder / "calls"
            words = ["strace", "-f", "-qq", "-e", f"trace={CALLS}", "-o", str(log), sys.executable, "-c", READ]
            subprocess.run([*words, str(opened.parts[0].path), str(images)], check=True)
            totals.append(len(log.read_text().splitlines()))
        per_image[name] = (totals[1] - totals[0]) / (20 * count)
    ratio = per_image["shards"] / per_image["loose"]
    print(f"\nopens and look-ups an image: {per_image}; shards / loose: {ratio:.4f}")


@contextlib.contextmanager
def slow_s3() -> Iterator[None]:
    """An S3 server in a process of its own, behind a proxy that delays what it answers; in the environment."""
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(PORT)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    ports: list[int] = []

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, delay: float) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 20):
                await asyncio.sleep(delay)
                target.write(data)
                await target.drain()
                delay = 0.0 if delay == 0 or len(data) > 1 << 15 else delay
        target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, to = await asyncio.open_connection("127.0.0.1", PORT)
        await asyncio.gather(copy(reader, to, LATENCY_S), copy(back, writer, 0.0))

    async def proxy() -> None:
        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        ports.append(listening.sockets[0].getsockname()[1])
        await listening.serve_forever()

    threading.Thread(target=lambda: asyncio.run(proxy()), daemon=True).start()
    while not ports:
        time.sleep(0.01)
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}"}
    os.environ.update(keys)
    try:
        import fsspec

        for _ in range(100):
            with contextlib.suppress(Exception):
                fsspec.filesystem("s3").mkdir("bucket")
                break
            time.sleep(0.3)
        yield
    finally:
        server.terminate()
        server.wait()


def train_from_s3(folder: Path, count: int, steps: int) -> None:
    """Print losses and the share of time spent waiting for data of a tiny run, from disk and from S3."""
    raw = write_images(folder, count, (500, 375))
    build("folder", raw, folder / "loose.arrow")
    with slow_s3():
        pack(folder / "loose.arrow", "s3://bucket/shards", Settings(shard_gb=0.02))
        found: dict[str, tuple[list[float], list[float]]] = {}
        for name, manifest in (("disk", folder / "loose.arrow"), ("S3", "s3://bucket/shards/loose.arrow")):
            words = [
                f"data.manifests=[{manifest}]", f"run.dir={folder / name}", "model.preset=mum_tiny", "data.workers=16",
                "data.image_size=128", "data.views=[2,8]", "data.frames_per_batch=32", f"train.steps={steps}",
                "train.log_every=5", "train.eval_every=1000", "train.picture_every=1000", "data.cache_gb=0",
                "optim.warmup_steps=5", f"train.checkpoint_every={steps}",
            ]  # fmt: skip
            subprocess.run(
                [sys.executable, "-m", "fastmum.train", *words], check=True, stdout=subprocess.DEVNULL, env=os.environ
            )
            records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            values: Any = [record for record in records if "data_wait" in record]
            found[name] = [r["loss"] for r in values], [r["data_wait"] for r in values]
    same = found["disk"][0] == found["S3"][0]
    print(f"\ntiny run of {steps} steps, 16 threads, {1000 * LATENCY_S:.0f} ms: losses equal bit for bit: {same}")
    for name, (_, waits) in found.items():
        print(f"  data_wait from {name}: median {statistics.median(waits):.1%}, each {[f'{w:.1%}' for w in waits]}")


OPEN = """
import json, sys, time
from fastmum.data.manifest import Manifests
def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(lines[key].split()[0]) / 1e3 for key in ("VmRSS", "RssAnon")]
import pyarrow
before, times = memory(), []
for _ in range(5):
    start = time.perf_counter(), time.process_time()
    manifests = Manifests(sys.argv[1:])
    times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
after = memory()
import numpy as np
rng = np.random.default_rng(0)
for _ in range(1000):
    manifests.files(rng.integers(0, manifests.num_frames, 96))
start = time.process_time()
for _ in range(100):
    manifests.files(rng.integers(0, manifests.num_frames, 96))
paths, read = (time.process_time() - start) / 100, memory()
from fastmum.data.plan import StepPlanner
planner = StepPlanner(manifests)
planner.plan(0, 0)
start = time.process_time()
for step in range(100):
    planner.plan(step, 0)
plan = (time.process_time() - start) / 100
print(f"\\n{manifests.num_frames} images in shards: opened in {min(t[0] for t in times):.3f} s "
      f"({min(t[1] for t in times):.3f} s CPU), plan {1e3 * plan:.2f} ms, paths of 96 images {1e3 * paths:.2f} ms")
print(f"  MB resident, private: imported {before}, opened {after}, 100,000 paths later {read}")
"""


def open_large(folder: Path, share: float) -> None:
    """Print time and memory to open manifests of 20 M images in shards."""
    paths = write_large_manifests(folder, share, packed=True)
    subprocess.run([sys.executable, "-c", OPEN, *map(str, paths)], check=True)


def write_models(folder: Path, count: int) -> Path:
    """COLMAP models of 500 images, 40,000 points and about 320,000 observations; the images are empty files."""
    for i in range(count):
        write_binary_model(draw_scene(500, 40_000, seed=i), folder / f"models/{i:03d}/sparse/0")
        (folder / f"models/{i:03d}/images").mkdir()
        for image in range(500):
            (folder / f"models/{i:03d}/images/{image:06d}.jpg").touch()
    return folder / "models"


def build_by_workers(folder: Path, count: int, rounds: int) -> None:
    """Print seconds of building the models, in turn, and how much faster two workers are.

    The results must be equal byte by byte. A Ray cluster is started before its time is taken. Half of the CPU time that
    two processes need, with starting them, is their time on two cores that nothing else uses.
    """
    models, seconds, cpu = write_models(folder, count), dict[str, list[float]](), dict[str, list[float]]()
    for _ in range(rounds):
        for ray, workers in ((None, 1), (None, 2), ("local", 1), ("local", 2)):
            name, out = f"{ray or 'processes'} {workers}", folder / f"{ray}-{workers}.arrow"
            with cluster(ray, workers):
                start = time.perf_counter(), sum(os.times()[:4])
                build("colmap", models, out, chain="angle", workers=workers, ray=ray)
                seconds.setdefault(name, []).append(time.perf_counter() - start[0])
                cpu.setdefault(name, []).append(sum(os.times()[:4]) - start[1])
            assert out.read_bytes() == (folder / "None-1.arrow").read_bytes()
            print(f"  {name}: {seconds[name][-1]:.1f} s, load {os.getloadavg()[0]:.1f}", flush=True)
    print(f"\n{count} COLMAP models, seconds with 1 and 2 workers, and their ratio (median of {rounds} rounds)")
    for what, times in (("processes", seconds), ("local", seconds), ("processes", cpu)):
        one, two = times[f"{what} 1"], times[f"{what} 2"]
        if times is cpu:
            two = [value / 2 for value in two]
        ratio = statistics.median(a / b for a, b in zip(one, two, strict=True))
        name = f"{what}, CPU time" if times is cpu else what
        print(f"  {name:<22}{statistics.median(one):8.1f}{statistics.median(two):8.1f}{ratio:8.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help="loaders, calls, s3, open, workers")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", default="500x375", help="of the images of loaders (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the files of loaders from the page cache")
    parser.add_argument("--steps", type=int, default=40, help="of the run from S3")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the 20 M images, or models")
    args = parser.parse_args(argv)
    width, height = map(int, args.size.split("x"))
    for part in args.parts or ("loaders", "calls", "s3", "open"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if part == "loaders":
                compare_loaders(folder, args.images, (width, height), args.rounds, args.cold)
            elif part == "calls":
                count_calls(folder, args.images)
            elif part == "s3":
                train_from_s3(folder, args.images, args.steps)
            elif part == "workers":
                build_by_workers(folder, 20 if args.quick else 400, args.rounds)
            else:
                open_large(folder, 0.05 if args.quick else 1.0)


if __name__ == "__main__":
    main()
