"""The start of a run: signals, the lock of its folder, and processes that do not fit together."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import wait_for
from runs import SMALL, free_port, run_train
from tiny_task import TINY, TinyTask

from fastmum.config import ConfigError, load_config
from fastmum.data.build import build
from fastmum.engine.distributed import DistContext, DistributedError, LaunchInfo
from fastmum.engine.rundir import RunDir
from fastmum.engine.stop import REQUEUE
from fastmum.train import main, train


@pytest.fixture
def command(tmp_path):
    """Starts `python -m fastmum.train` with more variables; its output goes to the file `log`."""
    started = []

    def command(*args, **environ):
        words = [sys.executable, "-m", "fastmum.train", *SMALL, f"run.dir={tmp_path}/run", *args]
        with open(tmp_path / "log", "w") as log:
            started.append(subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | environ))
        return started[-1]

    yield command
    for process in started:
        process.kill()
        process.wait()


def handles(process, number):
    """Whether a process has a handler for a signal."""
    (mask,) = [
        line.split()[1] for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in line
    ]
    return int(mask, 16) >> (number - 1) & 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, REQUEUE), (signal.SIGHUP, REQUEUE), (signal.SIGINT, 130)]
)
def test_a_signal_during_imports(command, tmp_path, number, code):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored, as under nohup")
    process = command()
    wait_for(lambda: handles(process, signal.SIGUSR1), "the first statement")
    process.send_signal(number)
    assert process.wait(60) == code
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith(signal.Signals(number).name)


@pytest.mark.slow
def test_a_signal_while_the_process_waits_for_the_others(command, tmp_path):
    """The main thread is in C++ code, which no handler interrupts."""
    port = free_port()
    process = command(
        RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )

    def listens():
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    wait_for(listens, "rendezvous")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == REQUEUE
    assert "SIGUSR1" in (tmp_path / "log").read_text()


def test_importing_the_package_and_the_module_handles_no_signal():
    code = "import signal; before = [*map(signal.getsignal, range(1, 32))]; import fastmum.train; "
    code += "print(before == [*map(signal.getsignal, range(1, 32))], signal.set_wakeup_fd(-1))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True", "-1"]


def test_every_batch_counts_as_progress(tmp_path):
    tasks = []

    class Kept(TinyTask):
        def __init__(self, *args):
            super().__init__(*args)
            tasks.append(self)

    assert train(load_config(None, [*TINY, f"run.dir={tmp_path}/run", "train.steps=5"], TinyTask.Config), Kept) == 0
    assert tasks[0].world.progress[0] >= 5 * 4


def test_a_folder_is_held_by_one_run(tmp_path, refusal):
    run, args = RunDir(tmp_path / "run"), [*TINY, f"run.dir={tmp_path}/run", "train.steps=1"]
    with run.held(DistContext()):
        error = refusal(main, *args)
        assert all(text in error for text in (str(run.root), socket.gethostname(), f"process {os.getpid()}"))
        run.config.write_text("")
        run.set_aside()
        assert "another run" in refusal(main, *args)
    assert main(args) == 0


def run_differently(rank_and_size, port, args, what, folder):
    """`train` in a process that differs in one respect; returns its error."""
    rank, size = rank_and_size
    with pytest.MonkeyPatch.context() as patch:
        match what:
            case "settings":
                args = [*args, f"optim.base_lr=0.00{rank + 1}"]
            case "version":
                patch.setattr("fastmum.train.source_version", lambda: f"commit {rank}")
            case "folder" | "manifest":  # another one under the same name
                patch.chdir(folder / str(rank))
                patch.setattr("fastmum.train.absolute_paths", lambda config, weights: config)
                patch.setattr("fastmum.engine.rundir.VISIBLE_WITHIN", 0.0)
                args = [*args, "run.dir=run"] if what == "folder" else args
            case "machines":
                launch = LaunchInfo(rank, size, rank, 1 + rank, "torchrun")
                patch.setattr("fastmum.train.read_launch_env", lambda: launch)
        try:
            run_train(rank_and_size, port, args)
        except (ConfigError, DistributedError) as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("settings", ["rank 1", "optim.base_lr 0.002", "0.001"]),
        ("version", ["rank 1", "fastmum commit 1", "commit 0"]),
        ("folder", ["rank 1", "run.dir is 'run'"]),
        ("manifest", ["rank 1", "data.arrow"]),
        ("machines", ["parallel.shard", "1 and 2"]),
    ],
)
def test_processes_that_differ_are_refused_on_all_ranks(pool, tmp_path, image_folder, what, named):
    for rank in "01":
        (tmp_path / rank).mkdir()
        build("folder", image_folder, tmp_path / rank / "data.arrow", dataset=rank)
    args = [*SMALL, f"run.dir={tmp_path}/run", "data.manifests=[data.arrow]"]
    if what != "manifest":
        args[-1] = f"data.root={image_folder}"
    if what == "machines":
        args.append("parallel.strategy=hsdp")
    errors = pool.run(2, run_differently, free_port(), args, what, tmp_path)
    assert errors[0] == errors[1]
    assert all(text in errors[0] for text in named), errors[0]
