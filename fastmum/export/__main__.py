"""The command line: `python -m fastmum.export RUN`."""

import argparse
import sys
from collections.abc import Sequence

from fastmum.errors import program, run_command
from fastmum.export.formats import FORMATS, export
from fastmum.files import expand_user
from fastmum.pretrained.arguments import add_overrides, parse_overrides


def _run(args: argparse.Namespace) -> None:
    overrides = parse_overrides(args.overrides, {"encoder_only": "--encoder-only", "ema": "--ema"})
    options = {"wrap": args.wrap, "license": args.license} | ({} if args.ema == "auto" else {"ema": args.ema})
    done = export(args.run, args.format, args.out, args.encoder_only, args.force, **options, **overrides)
    count = f"{done.parameters:,}" if done.parameters < 1e5 else f"{done.parameters / 1e6:.1f} M"
    step, path = done.source.step, done.source.path
    source = f"of '{path}'" if step is None else f"of step {step} ({path})"
    more = (", EMA weights" if done.source.ema else "") + (f"; {done.agreement}" if done.agreement else "")
    print(f"{done.file}: {count} parameters in {done.tensors} tensors, {source}{more}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    formats = "\n".join(f"  {name:13}{kind.meaning} ({kind.suffix})" for name, kind in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog=program("fastmum.export"),
        description="Export weights: of a run's newest whole checkpoint, or of anything that load_pretrained reads.",
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "run",
        type=expand_user,
        metavar="RUN",
        help="a run, a folder of checkpoints, a checkpoint, or a file of weights",
    )
    add("--format", metavar="NAME", default="released", help="see below (default %(default)s)")
    add(
        "--out",
        type=expand_user,
        metavar="FILE",
        help="default: mum_<step><suffix> in the run's folder, or next to the file",
    )
    add("--encoder-only", action="store_true", help="without the decoder, as for features")
    add("--ema", choices=("auto", "on", "off"), default="auto", help="EMA weights; auto: if the checkpoint has them")
    add("--wrap", metavar="KEY", help="format released: write {KEY: state dict}; the authors' forks expect model")
    add("--license", metavar="ID", help="licence of the weights, for the model card of a folder, such as cc-by-nc-4.0")
    add("--force", action="store_true", help="replace FILE")
    add_overrides(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
