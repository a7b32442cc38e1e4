"""What the engine can train. A task is a subclass of `fastmum.engine.task.Task`, found by the key `run.task`."""

import difflib
import importlib

from fastmum.config.schema import ConfigError
from fastmum.engine.task import Task

TASKS = {
    "mum": "fastmum.tasks.mum:MuMTask",
    "reconstruction": "fastmum.tasks.reconstruction.task:ReconstructionTask",
    "distillation": "fastmum.tasks.reconstruction.distill:DistillTask",
    "roma": "fastmum.tasks.roma.task:RomaTask",
    "pose": "fastmum.tasks.pose.task:PoseTask",
}


def find_task(name: str) -> type[Task]:
    """The class of a task; ConfigError for an unknown name."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"run.task is '{name}', but must be one of {', '.join(TASKS)}; the nearest is '{near}'")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
