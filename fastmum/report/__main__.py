"""Write a page about runs: `python -m fastmum.report RUN [RUN ...] [--out FILE]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmum.errors import FastmumError, program, run_command, writing
from fastmum.files import expand_user, write_atomic
from fastmum.report.figures import FORMATS, write_figures
from fastmum.report.page import report_page
from fastmum.report.run import distinct_labels, read_run


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("fastmum.report"),
        description="Write one HTML page about a run, finished or in progress: curves, reconstructions, cost, "
        "configuration, checkpoints and faults. The page needs no network and no other file. Several runs are drawn "
        "into the same charts.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (run.dir)")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html in the folder of the first run)")
    figures = "also write every chart and the reconstructions for talks into the folder figures/ next to the page"
    parser.add_argument("--figures", choices=FORMATS, help=figures)
    args = parser.parse_args(argv)

    def write() -> None:
        out = expand_user(args.out or args.runs[0] / "report.html")
        runs = distinct_labels([read_run(expand_user(root)) for root in args.runs])
        content = report_page(runs)
        with writing(out, FastmumError):
            write_atomic(out, content)
        print(f"{out} ({len(content.encode()) / 1e6:.1f} MB)")
        if args.figures:
            folder = out.parent / "figures"
            print(f"{folder} ({len(write_figures(folder, runs, args.figures))} figures)")

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
