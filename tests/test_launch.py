"""The launch scripts: the Python that they start, and `slurm.sh` on a real SLURM of one node."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from processes import wait_for
from runs import SMALL, free_port, numbers

from fastmum.data.build import build
from fastmum.engine.checkpoint import find_checkpoints
from fastmum.files import resource_dir


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("launcher", ["slurm", "torchrun"])
def test_the_python_of_the_nearest_environment_is_started(tmp_path, launcher):
    checkout = tmp_path / "checkout"
    script = shutil.copytree(resource_dir("launch"), checkout / "launch") / f"{launcher}.sh"
    write_script(tmp_path / "bin/scontrol", "echo node0")
    write_script(tmp_path / "bin/srun", 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"')
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0"}
    # From the last choice to the first.
    for variable, path in (
        (None, "bin/python3"), (None, "checkout/.venv/bin/python"), ("VIRTUAL_ENV", "venv/bin/python"),
        ("PYTHON", "other python"),
    ):  # fmt: skip
        python = write_script(tmp_path / path, f"echo '{path}' \"$@\"")
        if variable:
            environment[variable] = str(python.parents[1] if variable == "VIRTUAL_ENV" else python)
        words = ["bash", script, "--config", "a b"]
        # sbatch runs a copy of its script.
        folder = tmp_path if launcher == "torchrun" else checkout
        done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(path + " -m ")
        assert done.stdout.endswith("-m fastmum.train --config a b\n")


def test_a_cluster_of_ray_lasts_as_long_as_its_command(tmp_path):
    write_script(tmp_path / "bin/scontrol", "echo localhost; seq -f node%g 30000")  # more than a pipe holds
    skip = 'while [ "${1#-}" != "$1" ]; do shift; done'
    write_script(tmp_path / "bin/srun", f'{skip}; SLURM_NODEID=1 "$@"; export SLURM_NODEID=0; exec "$@"')
    listen = "import socket, sys; s = socket.create_server(('localhost', int(sys.argv[1]))); s.accept(); s.accept()"
    script = f'''
        echo "$RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}} $@"
        case "$*" in
            *--head*) echo $$ >pid; exec {sys.executable} -c "{listen}" $port;;
            *--ray*) exit 3;;
        esac'''
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "localhost,node1",
        "SLURM_CPUS_PER_TASK": "5", "RAY_TMPDIR": str(tmp_path / "ray"),
        "PYTHON": str(write_script(tmp_path / "bin/python", script)),
    }  # fmt: skip
    words = ["bash", resource_dir("launch") / "ray.sh", "data", "pack", "a b"]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout == "token 64 -m fastmum.cli data pack a b --ray localhost:20007\n"
    started = "token 64 -m ray.scripts.scripts start --block --num-cpus=5"
    nodes = (tmp_path / "fastmum-ray-20007.nodes.log").read_text().splitlines()
    assert nodes == [f"{started} --address=localhost:20007", f"{started} --head --port=20007 --include-dashboard=false"]
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


SLURM = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""


@pytest.fixture
def slurm(tmp_path_factory):
    """Calls a command of a SLURM of one node. Debian's packages are unpacked in a folder, not installed."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("archives/partial", "state", "spool"):
        (folder / name).mkdir(parents=True)
    packages = ["slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge"]
    options = ["-o", f"Dir::Cache={folder}", "-o", "Debug::NoLocking=1", "--no-install-recommends", "--reinstall"]
    try:
        words = ["apt-get", "install", "--yes", "--download-only", *options, *packages]
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
        for package in folder.glob("archives/*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True)
    except FileNotFoundError as error:
        pytest.skip(f"SLURM is taken from Debian's packages: {error}")
    except subprocess.SubprocessError as error:
        pytest.skip(f"SLURM cannot be downloaded by apt-get: {getattr(error, 'stderr', None) or error}")

    root, (plugins,) = folder / "root", folder.glob("root/usr/lib/*/slurm-wlm")
    settings = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser(), "plugins": plugins}
    ports = free_port(), free_port()
    (folder / "slurm.conf").write_text(SLURM.format(folder=folder, ports=ports, **settings))
    environment = {
        **os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "LD_LIBRARY_PATH": f"{plugins.parent}:{plugins}",
        "PATH": f"{root}/usr/bin:{root}/usr/sbin:{os.environ['PATH']}",
    }  # fmt: skip

    def command(*words: object, **more: str) -> str:
        done = subprocess.run([*map(str, words)], env=environment | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    command(root / "usr/sbin/mungekey", "--create", f"--keyfile={folder}/munge.key")
    with contextlib.ExitStack() as daemons, open(folder / "log", "w") as log:
        for name, *options in (
            ("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge),
            ("slurmctld-wlm", "-D"), ("slurmd-wlm", "-D", "-d", root / "usr/sbin/slurmstepd-wlm"),
        ):  # fmt: skip
            daemon = subprocess.Popen([root / "usr/sbin" / name, *options], env=environment, stdout=log, stderr=log)
            daemons.callback(daemon.wait)
            daemons.callback(daemon.terminate)
        wait_for(lambda: "idle" in command("sinfo") if (folder / "munge.socket").exists() else False, "an idle node")
        yield command
        command("scancel", "--user", settings["user"])
        wait_for(lambda: not command("squeue", "--noheader"), "the end of all jobs")


@pytest.mark.slow
def test_a_job_saves_on_a_signal_is_queued_again_and_resumes_but_not_after_scancel(slurm, image_folder, tmp_path):
    write_script(tmp_path / ".venv/bin/python", f'exec {sys.executable} "$@"')
    run, log, script = tmp_path / "run", tmp_path / "job.log", resource_dir("launch") / "slurm.sh"
    steps = [f"train.{key}=100000" for key in ("steps", "checkpoint_every", "eval_every", "picture_every")]
    args = [*SMALL, *steps, "train.device=cpu", "model.compile=off", f"data.root={image_folder}", f"run.dir={run}"]
    place = [f"--chdir={tmp_path}", f"--output={log}", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"]
    modules = {
        "MODULES": "cuda/12.8 python/3.12",
        "BASH_FUNC_module%%": '() { echo "module $*"; }',
        "VIRTUAL_ENV": "",
        "PYTHON": "",
    }
    job = slurm("sbatch", "--parsable", *place, script, *args, **modules).strip()

    def state() -> str:
        return slurm("scontrol", "show", "job", job)

    wait_for(lambda: numbers(run), "the first step", 240)
    slurm("scancel", "--signal=USR1", job)
    wait_for(lambda: "Restarts=1" in state(), "the requeue", 60)
    (saved,) = find_checkpoints(run)
    wait_for(lambda: numbers(run)[-1]["step"] > saved.manifest.step, "a step of the resumed job", 240)
    slurm("scancel", job)
    wait_for(lambda: "JobState=CANCELLED" in state(), "the end of the job", 60)
    text = log.read_text()
    assert "module load cuda/12.8 python/3.12" in text
    assert "[rank 1] SIGUSR1: saved at step" in text
    assert f"resumed from {saved.path} at step {saved.manifest.step}" in text
    assert text.count("queued again") == 1
    assert "[rank 1] SIGTERM: saved at step" in text
    assert [record["step"] for record in numbers(run)] == [*range(1, find_checkpoints(run)[0].manifest.step + 1)]


@pytest.mark.slow
def test_a_job_builds_on_a_cluster_of_its_own(slurm, image_folder, tmp_path):
    pytest.importorskip("ray")
    build("folder", image_folder, tmp_path / "one.arrow")
    place = ["--wait", f"--chdir={tmp_path}", f"--output={tmp_path}/job.log", "--cpus-per-task=1"]
    words = ["data", "build", "folder", "--root", image_folder, "--out", tmp_path / "two.arrow"]
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        script = resource_dir("launch") / "ray.sh"
        slurm("sbatch", *place, script, *words, PYTHON=sys.executable, RAY_TMPDIR=folder)
    assert "4 sequences" in (tmp_path / "job.log").read_text()
    assert (tmp_path / "two.arrow").read_bytes() == (tmp_path / "one.arrow").read_bytes()
