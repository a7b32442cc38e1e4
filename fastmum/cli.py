"""The `fastmum` command: `fastmum train ...` is `python -m fastmum.train ...`."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import fastmum
from fastmum.errors import FastmumError, run_command
from fastmum.files import resource_dir, write_atomic

CHECK = ("--check", "--no-sheet")  # `data check` is `data inspect` with these
MODULES = {
    "train": ("fastmum.train", "train a model from a configuration"),
    "evaluate": (
        "fastmum.evaluate",
        "evaluate weights: matching, views, recognition, segmentation, depth, reconstruction, ..., or all",
    ),
    "features": ("fastmum.features", "extract patch features of images"),
    "export": ("fastmum.export", "export a checkpoint to safetensors, ONNX and other formats"),
    "data build": ("fastmum.data.build", "build a manifest of a data set"),
    "data pack": ("fastmum.data.pack", "pack the files of manifests into tar shards"),
    "data unpack": ("fastmum.data.unpack", "write the files of manifests as loose files"),
    "data inspect": ("fastmum.data.inspect", "summarise and draw a manifest"),
    "data check": ("fastmum.data.inspect", "read and compare the files of a manifest"),
    "scenes": ("fastmum.scenes", "render synthetic scenes"),
    "predict": ("fastmum.predict", "predict images by a trained run: cameras, depth, points"),
    "report": ("fastmum.report", "write an HTML page about runs"),
}
LAUNCHERS = ("slurm", "torchrun", "ray")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Imports only the module of that command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"fastmum {fastmum.__version__}")
        return 0
    if words[0] == "launch":
        return _launch(words[1:])
    for name, (module, _) in MODULES.items():
        length = len(name.split())
        if words[:length] == name.split():
            sys.argv = [f"fastmum {name}", *(CHECK if name == "data check" else ()), *words[length:]]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            return 0
    wants_help = words[1:] in (["-h"], ["--help"]) and any(name.split()[0] == words[0] for name in MODULES)
    if not wants_help:
        print(f"error: unknown command '{' '.join(words[:2])}'", file=sys.stderr)
    print(_usage(), file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else 2


def _usage() -> str:
    lines = {name: meaning for name, (_, meaning) in MODULES.items()}
    lines["launch"] = "print or write a launch script: " + ", ".join(LAUNCHERS)
    commands = "\n".join(f"  {name:14}{meaning}" for name, meaning in lines.items())
    return (
        f"usage: fastmum COMMAND ...\n\ncommands:\n{commands}\n\n"
        "fastmum COMMAND --help shows the options of a command; fastmum --version the version"
    )


def _launch(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastmum launch",
        description="Print or write a script that starts a run on several devices; ray: a command on several nodes.",
    )
    parser.add_argument("launcher", choices=LAUNCHERS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write an executable file; existing files are kept")
    args = parser.parse_args(argv)

    def command() -> None:
        script = (resource_dir("launch") / f"{args.launcher}.sh").read_text(encoding="utf-8")
        script = script.replace("${PYTHON:-}", f"${{PYTHON:-{sys.executable}}}")
        if args.out is None:
            print(script, end="")
        elif args.out.exists():
            raise FastmumError(f"--out: '{args.out}' exists")
        else:
            write_atomic(args.out, script)
            args.out.chmod(0o755)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
