"""What the command line of the evaluations takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmum.data.errors import DataError
from fastmum.evaluate.matcher import TEMPERATURE
from fastmum.evaluate.pairs import SETS
from fastmum.evaluate.probe import ProbeSettings
from fastmum.evaluate.views import ViewSettings
from fastmum.pretrained.arguments import add_overrides

STEPS = {"cuda": 25_000, "cpu": 200}  # supplement, section B; and what a CPU does in minutes
EVALUATIONS = 10  # of a probe's training, unless asked otherwise: every 2,500 steps of 25 K
TRAIN_PAIRS = 2000  # whose features fit in memory: at most 6 GB of ViT-L at 448 px
FLAGS = {"counts": "views", "evaluate_every": "every"}  # fields of settings whose flags have other names
LEAST = {"max_pairs": 1, "train_pairs": 1, "steps": 1, "every": 1, "pictures": 0, "seed": 0, "masks": 1, "gap": 1}

_SETS = "\n".join(f"  {name:11}{layout.meaning}" for name, layout in SETS.items())
_EPILOG = f"""\
DATA is scenes or motorcycle, which need no files; a path, told apart by its content; or KIND:/path. Kinds:
{_SETS}

The evaluation `views` takes scenes, or any folder every sub-folder of which is a sequence of images.

DIR collects results: every evaluation adds a .json and pictures, and report.html and table.md show all that are
there, with the paper's numbers beside them. docs/evaluation.md has the protocols.
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser; `args.task` is matching, cosine, attention or views."""
    parser = argparse.ArgumentParser(
        prog="python -m fastmum.evaluate",
        description="What weights know about correspondence between views: matching by linear probe, by cosine "
        "similarity of features, and by the decoder's attention; and what other views do for the masked loss.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = _shared()
    tasks = parser.add_subparsers(dest="task", required=True, metavar="matching|cosine|attention|views")

    def task(name: str, about: str) -> argparse.ArgumentParser:
        description = f"{about[0].upper()}{about[1:]}."
        formatter = argparse.RawDescriptionHelpFormatter
        return tasks.add_parser(
            name, parents=[shared], help=about, description=description, epilog=_EPILOG, formatter_class=formatter
        )

    matching = task("matching", "dense matching by linear probes, trained in one pass on frozen features")
    cosine = task("cosine", "matching by cosine similarity of features, with and without the last LayerNorm")
    task("attention", "matching by the decoder's attention across views, and pictures of it")
    _add_training(matching)
    _add_views(task("views", "masked loss of the same frames with more and more views, and with views of other scenes"))
    for each in (matching, cosine):
        each.add_argument(
            "--temperature", type=float, default=TEMPERATURE, metavar="T", help="of the matcher (default %(default)s)"
        )
    return parser


def check(args: argparse.Namespace) -> None:
    """Check what argparse does not.

    Raises:
        DataError: a number that is too small.
    """
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise DataError(f"--{name.replace('_', '-')} is {value}, but must be at least {least}")
    if not 0 < getattr(args, "temperature", 1.0) < float("inf"):
        raise DataError(f"--temperature is {args.temperature}, but must be positive")


def probe_settings(args: argparse.Namespace, device: str) -> ProbeSettings:
    """How probes are trained.

    Args:
        args: parsed.
        device: "cuda" or "cpu", for what is left open.

    Raises:
        DataError: a value that cannot be.
    """
    steps = args.steps or STEPS[device]
    try:
        return ProbeSettings(
            steps=steps,
            batch=args.batch,
            evaluate_every=args.every or max(1, steps // EVALUATIONS),
            learning_rates=tuple(args.learning_rates),
            weight_decays=tuple(args.weight_decays),
            temperature=args.temperature,
            seed=args.seed,
        )
    except ValueError as error:
        raise DataError(_of_flag(error)) from None


def view_settings(args: argparse.Namespace) -> ViewSettings:
    """Which views are shown beside a frame.

    Args:
        args: parsed.

    Raises:
        DataError: a value that cannot be.
    """
    try:
        return ViewSettings(tuple(args.views), args.mask_ratio, gap=args.gap, masks=args.masks, seed=args.seed)
    except ValueError as error:
        raise DataError(_of_flag(error)) from None


def _of_flag(error: ValueError) -> str:
    """What is wrong with a field of settings, which the message begins with, said of its flag."""
    field, _, rest = str(error).partition(" ")
    return f"--{FLAGS.get(field, field).replace('_', '-')} {rest}"


def _shared() -> argparse.ArgumentParser:
    """What all evaluations take."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--weights", required=True, metavar="W",
        help="a run, a checkpoint or a file of weights; random:PRESET is an untrained model to compare with",
    )  # fmt: skip
    add_overrides(parser, "--override", more=", or a size of an untrained model, such as patch_size=8")
    parser.add_argument("--name", metavar="NAME", help="of the weights in the table (default: after the run or file)")
    parser.add_argument(
        "--data", default="scenes", metavar="DATA", help="pairs to evaluate on, see below (default %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="folder (default %(default)s)"
    )
    parser.add_argument(
        "--size", type=int, metavar="PX",
        help="side that pictures are resized to (default: 256 for scenes, 512 for NAVI, 224 for folders of "
        "sequences, else 448)",
    )  # fmt: skip
    parser.add_argument(
        "--max-pairs",
        type=int,
        metavar="N",
        help="evaluate on N pairs (views: frames), spread over the set (default: all)",
    )
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="pairs to draw (default %(default)s)")
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S",
        help="of random weights, of the order of training pairs, and of masks (default %(default)s)",
    )  # fmt: skip
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    """What the training of probes takes."""
    defaults = ProbeSettings()
    add = parser.add_argument_group("training of the probes").add_argument
    add("--train-data", metavar="DATA", help="pairs to train on (default: other scenes of --data)")
    add("--train-pairs", type=int, default=TRAIN_PAIRS, metavar="N", help="at most (default %(default)s)")
    add(
        "--steps", type=int, metavar="N",
        help=f"default: {STEPS['cuda']:,} as in the paper, {STEPS['cpu']} without a GPU",
    )  # fmt: skip
    add("--every", type=int, metavar="N", help="steps between evaluations (default: a tenth of --steps)")
    add("--batch", type=int, default=defaults.batch, metavar="N", help="pairs a step (default %(default)s)")
    add(
        "--learning-rates", type=float, nargs="+", default=defaults.learning_rates, metavar="LR",
        help="each with each weight decay makes a probe (default: %(default)s)",
    )  # fmt: skip
    add(
        "--weight-decays", type=float, nargs="+", default=defaults.weight_decays, metavar="WD",
        help="default: %(default)s",
    )  # fmt: skip


def _add_views(parser: argparse.ArgumentParser) -> None:
    """Which views are shown beside a frame, and what is masked."""
    defaults = ViewSettings()
    add = parser.add_argument_group("views").add_argument
    add(
        "--views", type=int, nargs="+", default=defaults.counts, metavar="S",
        help="numbers of views, from 1 (default: %(default)s)",
    )  # fmt: skip
    add(
        "--mask-ratio", type=float, default=defaults.mask_ratio, metavar="R",
        help="share of masked patches in every frame (default %(default)s)",
    )  # fmt: skip
    add("--gap", type=int, default=defaults.gap, metavar="N", help="steps between neighbours (default %(default)s)")
    add("--masks", type=int, default=defaults.masks, metavar="N", help="masks of every frame (default %(default)s)")
