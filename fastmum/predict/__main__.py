"""The command line: `fastmum predict RUN IMAGES --out DIR`."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

import torch

from fastmum.engine.checkpoint import CheckpointError
from fastmum.engine.checkpoint.manifest import find_checkpoints
from fastmum.errors import FastmumError, program, run_command
from fastmum.features.probe import find_probe, read_probe
from fastmum.files import expand_user

# Task of a run: module with `add_arguments(parser)`, of which all have --encoder and --device, and `predict(args)`.
PREDICTORS = dict.fromkeys(("reconstruction", "distillation"), "fastmum.predict.reconstruction")
PREDICTORS |= {"pose": "fastmum.predict.pose", "roma": "fastmum.predict.roma", "depth": "fastmum.predict.depth"}


def task_of(run: str) -> str:
    """The task of a run, a folder of checkpoints or a checkpoint, or a probe; CheckpointError if there is none."""
    path = expand_user(run)
    if find_probe(path) is not None:
        return str(read_probe(path).about["task"])
    found = find_checkpoints(path)
    for checkpoint in found:
        if checkpoint.manifest is not None:
            return str(checkpoint.manifest.values.get("task", "mum"))
    what = found[0].problem if found else f"there is no checkpoint in '{path}'" if path.exists() else ""
    raise CheckpointError(what or f"'{path}' does not exist")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog=program("fastmum.predict"), description="Predict images by a trained run, and write files.",
        epilog=f"The options depend on the task of the run ({', '.join(PREDICTORS)}): fastmum predict RUN --help",
    )  # fmt: skip
    parser.add_argument(
        "run", metavar="RUN", help="a run, one of its checkpoints, or a probe of fastmum evaluate; the first argument"
    )

    def command() -> None:
        if words and not words[0].startswith("-"):
            if (task := task_of(words[0])) not in PREDICTORS:
                what = f"'{words[0]}' is a run of the task '{task}', which predicts no files"
                raise FastmumError(f"{what}; runs of {', '.join(PREDICTORS)} do")
            module = importlib.import_module(PREDICTORS[task])
            module.add_arguments(parser)
            parser.add_argument(
                "--encoder", metavar="SPEC", help="weights of the encoder, if they were moved since the training"
            )
            parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (%(default)s)")
            args = parser.parse_args(words)
            try:
                module.predict(args)
            except torch.OutOfMemoryError:
                raise FastmumError(
                    "the memory of the device is too small: pass fewer images, or a lower --size"
                ) from None
        else:
            parser.parse_args(words)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
