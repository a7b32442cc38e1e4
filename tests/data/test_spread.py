"""Work on a real Ray cluster of two nodes equals that of one process; errors of clusters are one line."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import wait_for
from runs import free_port

from benchmarks.synthetic_scene import draw_scene, write_binary_model
from fastmum.data.build import build
from fastmum.data.build import main as build_command
from fastmum.data.errors import DataError
from fastmum.data.inspect import main as inspect
from fastmum.data.pack import Settings, pack
from fastmum.data.spread import cluster, spread
from fastmum.errors import FastmumError

ROOT = Path(__file__).resolve().parents[2]
NODE = ["--num-cpus=1", "--object-store-memory=100000000", "--block"]


class Cluster:
    """Nodes of a Ray cluster; each is a process group of this machine with one CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"
        self.nodes: list[subprocess.Popen] = []
        self.start("--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false")

    def start(self, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
        """A node, the commands `before` it in a shell that has a mount namespace of its own."""
        script = " && ".join(
            [*before, f"exec {sys.executable} -m ray.scripts.scripts start {' '.join([*words, *NODE])}"]
        )
        apart = ["unshare", "--map-root-user", "--mount"] if before else []
        log = self.folder / f"node{len(self.nodes)}.log"
        with open(log, "w") as file:
            node = subprocess.Popen(
                [*apart, "sh", "-c", script], stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        self.nodes.append(node)
        wait_for(lambda: "block forever" in log.read_text() or node.poll() is not None, "a node", 120)
        assert node.poll() is None, log.read_text()
        return node

    def join(self, **options) -> subprocess.Popen:
        return self.start(f"--address={self.address}", **options)

    def kill(self, node: subprocess.Popen) -> None:
        """As if its machine was switched off."""
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def working(self, node: subprocess.Popen) -> bool:
        """Whether a process of a node has a task."""
        words = ["ps", "--sid", str(node.pid), "-o", "args="]
        return "ray::_run" in subprocess.run(words, capture_output=True, text=True).stdout


@pytest.fixture(scope="module", autouse=True)
def folder():
    """Folder and token of a cluster, which Ray reads when it is imported."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short path
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "a" * 40)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield Path(folder)


@pytest.fixture(scope="module")
def ray_cluster(folder):
    """A cluster of one node, which other tests add nodes to."""
    pytest.importorskip("ray")
    found = Cluster(folder)
    yield found
    for node in found.nodes:
        if node.poll() is None:
            found.kill(node)


def write_collections(folder: Path, count: int) -> Path:
    """Several COLMAP models with their images, as files without content; building one takes a part of a second."""
    rng = np.random.default_rng(0)
    for i in range(count):
        scene = draw_scene(24 + int(rng.integers(8)), 500, seed=i)
        write_binary_model(scene, folder / f"{i:03d}/sparse/0")
        (folder / f"{i:03d}/images").mkdir()
        for image in range(len(scene.headings)):
            (folder / f"{i:03d}/images/{image:06d}.jpg").touch()
    return folder


def test_results_come_in_order_and_errors_of_clusters_are_one_line(image_folder, tmp_path, monkeypatch, refusal):
    assert list(spread(len, ["aa", "", "b"], threads=2)) == [2, 0, 1]
    words = "folder", "--root", image_folder, "--out", tmp_path / "m.arrow", "--ray"
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "ray", None)
        assert "pip install 'fastmum[ray]'" in refusal(build_command, *words, "auto")
    pytest.importorskip("ray")
    closed = f"127.0.0.1:{free_port()}"
    for address, reason in ((closed, "refused"), ("somewhere", "HOST:PORT")):
        error = refusal(build_command, *words, address)
        assert f"--ray '{address}'" in error
        assert reason in error
    monkeypatch.setenv("RAY_ADDRESS", closed)  # which Ray itself would wait for
    assert "refused" in refusal(build_command, *words, "auto")
    assert not (tmp_path / "m.arrow").exists()


@pytest.mark.slow
def test_a_build_goes_on_when_a_node_is_killed(ray_cluster, tmp_path):
    raw = write_collections(tmp_path / "raw", 40)
    build("colmap", raw, tmp_path / "one.arrow")
    words = ["data", "build", "colmap", "--root", raw, "--out", tmp_path / "two.arrow", "--ray", ray_cluster.address]
    lost = ray_cluster.join()
    driver = subprocess.Popen(
        [sys.executable, "-m", "fastmum.cli", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=tmp_path,
    )  # fmt: skip
    wait_for(lambda: ray_cluster.working(lost), "a task on the second node", 120)
    assert driver.poll() is None
    ray_cluster.kill(lost)
    output, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert "40 parts" in output
    assert (tmp_path / "two.arrow").read_bytes() == (tmp_path / "one.arrow").read_bytes()


@pytest.mark.slow
def test_packing_checking_and_features_equal_those_of_one_process(ray_cluster, image_folder, tmp_path, tiny, capsys):
    from fastmum.features import extract, find_images

    (image_folder / "scene1/1.png").write_bytes(b"no image")
    settings, address = Settings(shard_gb=2e-5, broken="skip"), ray_cluster.address
    build("folder", image_folder, tmp_path / "list.arrow", ray=address)
    node = ray_cluster.join()
    with cluster(address):
        for out, ray in (("one", None), ("two", address)):
            assert pack(tmp_path / "list.arrow", tmp_path / out, settings, ray=ray).frames == 23
        files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
        assert len(files) > 4
        assert {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()} == files
        check = [str(tmp_path / "two/list.arrow"), "--check", "--no-sheet", "--ray", address]
        assert inspect(check) == 0
        shard = tmp_path / "two/list-000001.tar"
        shard.write_bytes(shard.read_bytes()[:-2000] + bytes(2000))
        (image_folder / "scene2/1.png").unlink()
        capsys.readouterr()
        assert inspect(check) == 1
        assert "list-000001.index" in capsys.readouterr().out
        assert inspect([str(tmp_path / "list.arrow"), *check[1:]]) == 1
        assert str(image_folder / "scene2/1.png") in capsys.readouterr().out
        torch.set_num_threads(1)
        found = []
        for ray in (None, address):
            images = find_images([image_folder])
            found.append((extract(tiny.eval(), images, batch=2, ray=ray), images.skipped))
        (one, skipped), (two, skipped_two) = found
        assert skipped == skipped_two
        assert list(skipped) == ["scene1/1.png"]
        assert list(one) == list(two)
        for name in one:
            assert torch.equal(one[name].patch, two[name].patch)
            assert torch.equal(one[name].cls, two[name].cls)
    ray_cluster.kill(node)


@pytest.mark.slow
def test_nodes_that_differ_are_named(ray_cluster, tmp_path):
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], check=False).returncode:
        pytest.skip("this machine allows no mount namespaces")
    run = partial(spread, time.sleep, [0.2] * 64, ray=ray_cluster.address, paths=(tmp_path, "s3://bucket"))
    assert list(run()) == [None] * 64
    hidden = ray_cluster.join(before=(f"mount -t tmpfs none {tmp_path.parent}",))
    with pytest.raises(FastmumError, match=rf"node .*\(.*\) does not see '{tmp_path}'"):
        list(run())
    ray_cluster.kill(hidden)
    copied = shutil.copytree(ROOT / "fastmum", tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    with (copied / "progress.py").open("a") as file:
        file.write("# another version\n")
    other = ray_cluster.join(before=(f"mount --bind {copied} {ROOT / 'fastmum'}",))
    with pytest.raises(DataError, match=r"node .* has fastmum .*; install the same"):
        list(run())
    ray_cluster.kill(other)
    without = ray_cluster.join(before=(f"mount -t tmpfs none {ROOT / 'fastmum'}",))
    with pytest.raises(DataError, match=r"node .* has no fastmum"):
        list(run())
    ray_cluster.kill(without)
