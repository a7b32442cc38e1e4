"""Write a page about runs: `python -m fastmum.report RUN [RUN ...] [--out FILE]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmum.report.page import page
from fastmum.report.run import ReportError, read_run, with_labels


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastmum.report",
        description="Write one HTML page about a run, finished or going on: curves, reconstructions over time, cost, "
        "configuration, checkpoints, faults. It needs no network and no other file. Curves of several runs are "
        "laid over each other.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (run.dir)")
    parser.add_argument("--out", type=Path, help="the page; report.html in the first run's folder by default")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "report.html"
    try:
        content = page(with_labels([read_run(root.expanduser()) for root in args.runs]))
        _write(out.expanduser(), content)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out} ({len(content.encode()) / 1e6:.1f} MB)")
    return 0


def _write(out: Path, content: str) -> None:
    partial = out.with_name(f"partial_{out.name}")
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ReportError(f"'{out}' cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(main())
