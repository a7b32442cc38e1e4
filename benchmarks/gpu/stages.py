"""The table of stages, in the order in which they run: what decides most comes first."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TORCH = ("torch", "triton")
# Module -> package.
STEP = {"omegaconf": "omegaconf", "yaml": "pyyaml", "PIL": "pillow", "pyarrow": "pyarrow", "xxhash": "xxhash"}
TRAINER = STEP | {
    "tqdm": "tqdm", "platformdirs": "platformdirs", "tensorboard": "tensorboard", "skimage": "scikit-image",
}  # fmt: skip
TESTS = STEP | {"safetensors": "safetensors", "pytest": "pytest", "hypothesis": "hypothesis"}
TABLES = TESTS | {"pytest_benchmark": "pytest-benchmark", "matplotlib": "matplotlib", "tqdm": "tqdm"}
PACKAGES = {name: name for name in TORCH} | TRAINER | TABLES


class Stage(NamedTuple):
    """A program of this package.

    Args:
        name: of the stage, for `--only`.
        title: what it measures.
        module: of `benchmarks.gpu`.
        seconds: its time limit.
        words: further words for the program.
        needs: modules that it imports.
        environment: variables.
        tool: a program that must be on the PATH.
        cuda_only, cpu_only: words for the program on one kind of device.
    """

    name: str
    title: str
    module: str
    seconds: int
    words: tuple[str, ...] = ()
    needs: Sequence[str] = TORCH
    environment: tuple[tuple[str, str], ...] = ()
    tool: str | None = None
    cuda_only: tuple[str, ...] = ()
    cpu_only: tuple[str, ...] = ()

    def why_not(self) -> str | None:
        """Why it cannot run here, with the remedy."""
        missing = missing_packages(self.needs)
        if missing:
            return f"pip install {' '.join(missing)} (wheels do, without a network)"
        if self.tool and not shutil.which(self.tool):
            return f"{self.tool} is not on the PATH"
        return None


def missing_packages(modules: Sequence[str]) -> list[str]:
    """Names of the packages of modules that cannot be found."""
    return [PACKAGES[module] for module in modules if importlib.util.find_spec(module) is None]


EAGER = ("model.compile=off",)  # on a CPU, where compilation takes longer than the steps
STAGES = {
    stage.name: stage
    for stage in (
        Stage("products", "Fused products against the library's", "products", 90),
        Stage("attention", "Attention across frames", "attention", 90, needs=(*TORCH, "xxhash")),
        Stage("step", "The training step with fused products", "step", 120, needs=(*TORCH, *STEP),
              environment=(("FASTMUM_PRODUCTS", "fused"),), cpu_only=EAGER),
        Stage("library", "The training step with the library's products", "step", 60, needs=(*TORCH, *STEP),
              environment=(("FASTMUM_PRODUCTS", "library"),), cpu_only=EAGER),
        Stage("graphs", "The training step in CUDA graphs", "step", 120, needs=(*TORCH, *STEP),
              cuda_only=("train.cuda_graphs=true",), cpu_only=EAGER),
        Stage("tests", "Tests of kernels and attention", "device_tests", 150,
              needs=(*TORCH, *TESTS)),
        Stage("reference", "The step against the released model's", "reference", 150, needs=(*TORCH, *STEP),
              cpu_only=EAGER),
        Stage("resume", "Training, and the same training resumed", "resume", 100,
              needs=(*TORCH, *TRAINER), cpu_only=EAGER),
        Stage("memcheck", "Invalid accesses of memory", "memcheck", 120, tool="compute-sanitizer"),
        Stage("tables", "Benchmarks at the paper's sizes", "tables", 1800,
              needs=(*TORCH, *TABLES)),
    )
}  # fmt: skip
