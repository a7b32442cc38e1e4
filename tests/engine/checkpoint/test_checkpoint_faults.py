"""Processes killed while they write, disks that fill up, a rank that cannot write."""

import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch
from processes import FORKSERVER
from states import ABOUT, CONFIG, full_state, load, placed_state, save

from fastmum.engine.checkpoint import CheckpointError, Checkpoints, find_checkpoints, load_newest


def counting_state(step):
    """A few MB that say everywhere of what step they are."""
    return {f"model.{i}": torch.full((1 << 18,), float(step)) for i in range(4)}


def write_for_ever(folder, pipe):
    """Go on from the newest checkpoint, and write one after the other; say which are there."""
    torch.set_num_threads(1)
    state = counting_state(0)
    about = load_newest(folder, state, CONFIG)
    step = about.step if about else 0
    assert all((tensor == step).all() for tensor in state.values())
    writer = Checkpoints(folder, keep=2)
    pipe.send(step)
    while True:
        step += 1
        writer.before_update()
        for tensor in state.values():
            tensor.fill_(step)
        writer.save(step, state, ABOUT)
        if writer.newest:
            pipe.send(find_checkpoints(writer.newest)[0].manifest.step)


def kill_while_writing(folder, times):
    rng = random.Random(os.getpid())
    partial = 0
    published = 0
    for _ in range(times):
        ours, theirs = FORKSERVER.Pipe()
        process = FORKSERVER.Process(target=write_for_ever, args=(folder, theirs))
        process.start()
        theirs.close()
        resumed = ours.recv()
        assert resumed >= published
        time.sleep(rng.uniform(0.01, 0.2))
        process.kill()
        process.join()
        try:
            while ours.poll():
                published = ours.recv()
        except EOFError:
            pass
        partial += any(not (path / "checkpoint.json").exists() for path in folder.iterdir())
        state = counting_state(-1)
        about = load_newest(folder, state, CONFIG)
        assert (about.step if about else 0) >= published
        assert all((tensor == (about.step if about else -1)).all() for tensor in state.values())
    assert partial, "no process was killed in the middle of a checkpoint"


def test_killed_at_random_moments_a_whole_checkpoint_is_there(tmp_path):
    kill_while_writing(tmp_path, 20)


@pytest.mark.exhaustive
def test_killed_at_very_many_random_moments(tmp_path):
    kill_while_writing(tmp_path, 400)


FILLS_UP = """
import json, sys
from pathlib import Path
import torch
from states import ABOUT, CONFIG
from fastmum.engine.checkpoint import CheckpointError, Checkpoints, load_newest

folder, seen = Path(sys.argv[1]), []
state = {f"model.{i}": torch.zeros(100_000) for i in range(5)}  # 2 MB
writer = Checkpoints(folder, keep=1)
for step, ballast in ((1, 0), (2, 3_000_000), (3, 3_900_000), (4, 0)):
    (folder / "ballast").write_bytes(bytes(ballast))
    for tensor in state.values():
        tensor.fill_(step)
    writer.save(step, state, ABOUT)
    writer.before_update()
    try:
        writer.wait()
        error = ""
    except CheckpointError as caught:
        error = str(caught)
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    loaded = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    about = load_newest(folder, loaded, CONFIG)
    values = [tensor.unique().tolist() for tensor in loaded.values()]
    seen.append([error, writer.failed, names, about.step, values])
print(json.dumps(seen))
"""


@pytest.fixture
def small_disk(tmp_path):
    """A command before others, for which a folder is a disk of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["sh", "-c", 'mount -t tmpfs -o size=6m tmpfs "$0" && exec "$@"', str(folder)]
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        prefix = [*unshare, *mount]
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return folder, prefix
    pytest.skip("a small disk can be mounted neither as this user nor in a user namespace (unshare -rm)")


def test_a_full_disk_costs_the_checkpoints_that_do_not_fit(small_disk):
    folder, prefix = small_disk
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*prefix, sys.executable, "-c", FILLS_UP, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    full = f"checkpoint '{folder}/step_000000%d' could not be written (No space left on device)"
    first, *failed, last = json.loads(done.stdout)
    assert first == ["", 0, ["step_0000001"], 1, [[1.0]] * 5]
    for count, (error, *rest) in enumerate(failed, 1):
        assert error.startswith(full % (count + 1))
        assert rest == [count, ["step_0000001"], 1, [[1.0]] * 5]
    assert last == ["", 2, ["step_0000004"], 4, [[4.0]] * 5]


ENDS = """
import os, sys, time
from pathlib import Path
from states import ABOUT, full_state
from fastmum.engine.checkpoint import Checkpoints

sync = os.fsync
os.fsync = lambda file: (time.sleep(0.2), sync(file))  # a slow disk
writer = Checkpoints(Path(sys.argv[1]), keep=1)
writer.save(3, full_state(3), ABOUT)
sys.exit(2)
"""


def test_a_process_that_ends_in_the_middle_finishes_it(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ENDS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (2, "")
    state = full_state(9)
    assert load_newest(tmp_path, state, CONFIG).step == 3
    torch.testing.assert_close(state, full_state(3), rtol=0, atol=0)


def write_with_little_room_on_rank_1(team, folder, strategy):
    """The last of three checkpoints, and the one between that rank 1 may not write: RLIMIT_FSIZE."""
    import torch.distributed as dist

    log, records = logging.getLogger("fastmum"), []
    handler = logging.Handler()
    handler.emit = records.append
    log.addHandler(handler)
    writer = Checkpoints(folder, keep=3, group=team.group)
    outcomes = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (1, 2, 3):
        if step == 2 and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        writer.save(step, placed_state(team, strategy, step), ABOUT)
        writer.before_update()
        try:
            writer.wait()
            outcomes.append("")
        except CheckpointError as error:
            outcomes.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.removeHandler(handler)
    return outcomes, writer.failed, writer.newest.name, [record.getMessage() for record in records]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "hsdp"])
def test_one_rank_that_cannot_write_fails_on_all_alike(team, tmp_path, strategy):
    seen = team.run(4, write_with_little_room_on_rank_1, tmp_path, strategy)
    for rank, (outcomes, failed, newest, lines) in enumerate(seen):
        assert outcomes[0] == outcomes[2] == ""
        assert "step_0000002' could not be written (rank 1: File too large)" in outcomes[1]
        assert (failed, newest) == (1, "step_0000003")
        assert len(lines) == (rank == 0)
    assert [found.manifest.step for found in find_checkpoints(tmp_path)] == [3, 1]
    assert not list(tmp_path.glob("*.partial"))


def test_ranks_refuse_another_model_together(team, tmp_path):
    team.run(2, save, tmp_path, "fsdp2", 5, 12)
    assert set(team.run(2, load_another, tmp_path)) == {
        f"checkpoint '{tmp_path}/step_0000012' holds another model: depth 2 (configured: 9); "
        "choose another run.dir, or train.resume=never to set the old run aside"
    }


def load_another(team, folder):
    try:
        load_newest(folder, placed_state(team, "fsdp2", 1), {**CONFIG, "depth": 9}, team.group)
    except CheckpointError as error:
        return str(error)


def test_a_run_of_two_goes_on_with_four_and_then_alone(team, tmp_path):
    for size, strategy, step in ((2, "fsdp2", 1), (4, "hsdp", 2), (1, "ddp", 3)):
        team.run(size, save, tmp_path, strategy, step, step)
        for seen, state in team.run(4, load, tmp_path, "fsdp2"):
            assert seen == step
            torch.testing.assert_close(state, full_state(step), rtol=0, atol=0)
