"""The command line of the evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeVar

from fastmum.data.errors import DataError
from fastmum.evaluate.matcher import TEMPERATURE
from fastmum.evaluate.pairs import SETS
from fastmum.evaluate.probe import ProbeSettings
from fastmum.evaluate.views import ViewSettings
from fastmum.pretrained.arguments import add_overrides

T = TypeVar("T")

STEPS = {"cuda": 25_000, "cpu": 200}  # the paper's (supplement, section B), and minutes on a CPU
TRAIN_PAIRS = 2000  # whose features fit in memory: at most 6 GB for ViT-L at 448 px
FLAGS = {"counts": "views", "evaluate_every": "every"}  # fields of settings whose flags have other names
LEAST = {"max_pairs": 1, "train_pairs": 1, "steps": 1, "every": 1, "pictures": 0, "seed": 0, "masks": 1, "gap": 1}
HELP = {
    "matching": "dense matching by linear probes, trained in one pass on frozen features",
    "cosine": "matching by cosine similarity of features, with and without the last LayerNorm",
    "attention": "matching by the decoder's attention across views, with pictures",
    "views": "masked loss of the same frames with more and more views, and with views of other scenes",
}

_SETS = "\n".join(f"  {name:11}{layout.meaning}" for name, layout in SETS.items())
_EPILOG = f"""\
DATA is scenes or motorcycle, which need no files; a path, whose kind is detected; or KIND:/path. Kinds:
{_SETS}

The evaluation `views` takes scenes, or any folder whose sub-folders are sequences of images.

DIR collects results: every evaluation adds a .json and pictures; report.html and table.md show all of them next to the
paper's numbers. docs/evaluation.md describes the protocols.
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser; `args.task` is matching, cosine, attention or views."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m fastmum.evaluate",
        description="Measure correspondence between views: matching by linear probe, by cosine similarity of features, "
        "and by the decoder's attention; and the effect of other views on the masked loss.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="task", required=True, metavar="|".join(HELP))
    about: dict[str, Any] = {"parents": [_shared()], "epilog": _EPILOG, "formatter_class": raw}
    tasks = {
        task: commands.add_parser(task, help=text, description=f"{text[0].upper()}{text[1:]}.", **about)
        for task, text in HELP.items()
    }
    _add_training(tasks["matching"])
    _add_views(tasks["views"])
    for task in ("matching", "cosine"):
        temperature = "of the matcher (%(default)s)"
        tasks[task].add_argument("--temperature", type=float, default=TEMPERATURE, metavar="T", help=temperature)
    return parser


def _shared() -> argparse.ArgumentParser:
    """Arguments of all evaluations."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    weights = "a run, a checkpoint or a file of weights; random:PRESET is an untrained model to compare with"
    size = "side of the resized pictures (256 for scenes, 512 for NAVI, 224 for folders of sequences, else 448)"
    pairs = "evaluate on N pairs (views: frames), evenly spread over the set (default: all)"
    seed = "of random weights, of the order of training pairs, and of masks (%(default)s)"
    add("--weights", required=True, metavar="W", help=weights)
    add_overrides(parser, "--override", more=", or a size of an untrained model, such as patch_size=8")
    add("--name", metavar="NAME", help="of the weights in the table (default: that of the run or file)")
    add("--data", default="scenes", metavar="DATA", help="pairs to evaluate on, see below (%(default)s)")
    add("--out", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="folder of results (%(default)s)")
    add("--size", type=int, metavar="PX", help=size)
    add("--max-pairs", type=int, metavar="N", help=pairs)
    add("--pictures", type=int, default=4, metavar="N", help="pairs to draw (%(default)s)")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help=seed)
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    defaults, add = ProbeSettings(), parser.add_argument_group("training of the probes").add_argument
    rates, decays = defaults.learning_rates, defaults.weight_decays
    steps = f"default: {STEPS['cuda']:,} as in the paper, {STEPS['cpu']} without a GPU"
    probes = "each combination with a weight decay makes a probe (%(default)s)"
    add("--train-data", metavar="DATA", help="pairs to train on (default: other scenes of --data)")
    add("--train-pairs", type=int, default=TRAIN_PAIRS, metavar="N", help="maximum number (%(default)s)")
    add("--steps", type=int, metavar="N", help=steps)
    add("--every", type=int, metavar="N", help="steps between evaluations (default: a tenth of --steps)")
    add("--batch", type=int, default=defaults.batch, metavar="N", help="pairs a step (%(default)s)")
    add("--learning-rates", type=float, nargs="+", default=rates, metavar="LR", help=probes)
    add("--weight-decays", type=float, nargs="+", default=decays, metavar="WD", help="(%(default)s)")


def _add_views(parser: argparse.ArgumentParser) -> None:
    defaults, add = ViewSettings(), parser.add_argument_group("views").add_argument
    ratio = "share of masked patches in every frame (%(default)s)"
    add("--views", type=int, nargs="+", default=defaults.counts, metavar="S", help="numbers of views (%(default)s)")
    add("--mask-ratio", type=float, default=defaults.mask_ratio, metavar="R", help=ratio)
    add("--gap", type=int, default=defaults.gap, metavar="N", help="steps between neighbours (%(default)s)")
    add("--masks", type=int, default=defaults.masks, metavar="N", help="masks of every frame (%(default)s)")


def check(args: argparse.Namespace) -> None:
    """Check the numbers that no settings class checks; raises `DataError`."""
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise DataError(f"--{name.replace('_', '-')} is {value}, but must be at least {least}")
    if not 0 < getattr(args, "temperature", 1.0) < float("inf"):
        raise DataError(f"--temperature is {args.temperature}, but must be positive")


def probe_settings(args: argparse.Namespace, device: str) -> ProbeSettings:
    """Settings of the probes, with the default steps of the device ("cuda" or "cpu"); raises `DataError`."""
    steps = args.steps or STEPS[device]
    return _settings(
        ProbeSettings,
        steps=steps,
        batch=args.batch,
        evaluate_every=args.every or max(1, steps // 10),
        learning_rates=tuple(args.learning_rates),
        weight_decays=tuple(args.weight_decays),
        temperature=args.temperature,
        seed=args.seed,
    )


def view_settings(args: argparse.Namespace) -> ViewSettings:
    """Settings of the other views; raises `DataError`."""
    more = {name: getattr(args, name) for name in ("mask_ratio", "gap", "masks", "seed")}
    return _settings(ViewSettings, counts=tuple(args.views), **more)


def _settings(kind: type[T], **values: Any) -> T:
    """Settings of a class whose errors start with the field; raises a `DataError` that names the flag instead."""
    try:
        return kind(**values)
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        raise DataError(f"--{FLAGS.get(field, field).replace('_', '-')} {rest}") from None
