import pytest
from crew import Crew, free_port, run_main
from processes import FORKSERVER


@pytest.fixture(scope="session")
def crew():
    """Processes that train together, shared by all tests."""
    crew = Crew()
    yield crew
    crew.close()


@pytest.fixture
def start(image_folder, tmp_path):
    """Start a run of several processes, in separate processes that are killed after the test."""
    processes = []

    def start(size, *words):
        data = [] if "run.task=tiny" in words else [f"data.root={image_folder}"]
        port, words = free_port(), [*data, f"run.dir={tmp_path}/run", *words]
        started = [
            FORKSERVER.Process(target=run_main, args=(rank, size, port, words, str(tmp_path / f"words-{rank}")))
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
