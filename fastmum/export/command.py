"""The command line of exports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmum.export.errors import ExportError
from fastmum.export.formats import FORMATS, Exported, export
from fastmum.pretrained import WeightsError
from fastmum.pretrained.arguments import add_overrides, parse_overrides


def _parser() -> argparse.ArgumentParser:
    formats = "\n".join(f"  {name:13}{kind.meaning} ({kind.suffix})" for name, kind in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fastmum.export",
        description="Write weights for use outside of training: of a run's newest checkpoint that is whole, or of "
        "whatever load_pretrained reads.",
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a run, of checkpoints, one checkpoint, or a file of weights"
    )
    parser.add_argument("--format", metavar="NAME", default="released", help="see below (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="default: mum_<step><suffix> in the run's folder, or beside the file of weights under its name",
    )  # fmt: skip
    parser.add_argument("--encoder-only", action="store_true", help="without the decoder, as features are computed")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    add_overrides(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        overrides = parse_overrides(args.overrides, {"encoder_only": "--encoder-only"})
        done = export(args.run, args.format, args.out, args.encoder_only, args.force, **overrides)
    except (WeightsError, ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(_line(done))
    return 0


def _line(done: Exported) -> str:
    count = f"{done.parameters:,}" if done.parameters < 1e5 else f"{done.parameters / 1e6:.1f} M"
    step, path = done.about.step, done.about.path
    source = f"of '{path}'" if step is None else f"of step {step} ({path})"
    agreement = f"; {done.agreement}" if done.agreement else ""
    return f"{done.file}: {count} parameters in {done.tensors} tensors, {source}{agreement}"
