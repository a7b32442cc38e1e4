import pytest
from processes import FORKSERVER, Pool
from runs import free_port, numbers, ranks_by_size, run_main, run_train


@pytest.fixture(scope="session")
def pool():
    pool = Pool(120, ranks_by_size)
    yield pool
    pool.close()


@pytest.fixture
def run(request, pool, image_folder, tmp_path):
    """Train in a folder on 1 to 4 processes, with the `ARGS` of the test's module and more; returns the metrics."""

    def run(name, size, *more):
        args = [*request.module.ARGS, f"run.dir={tmp_path / name}", *more]
        if not any(arg.startswith("run.task=") for arg in args):
            args.append(f"data.root={image_folder}")
        assert pool.run(size, run_train, free_port(), args) == [0] * size
        return numbers(tmp_path / name)

    return run


@pytest.fixture
def start(image_folder, tmp_path):
    """Start a run in separate processes, which are killed after the test; each writes `log-<rank>`."""
    processes = []

    def start(size, *args):
        data = [] if any(arg.startswith("run.task=") for arg in args) else [f"data.root={image_folder}"]
        port, args = free_port(), [*data, f"run.dir={tmp_path}/run", *args]
        started = [
            FORKSERVER.Process(target=run_main, args=(rank, size, port, args, tmp_path / f"log-{rank}"))
            for rank in range(size)
        ]
        for process in started:
            process.start()
        processes.extend(started)
        return started

    yield start
    for process in processes:
        process.kill()
        process.join()
