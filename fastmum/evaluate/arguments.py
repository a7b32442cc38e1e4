"""Arguments of `fastmum evaluate`."""

import argparse
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from fastmum.data.errors import DataError
from fastmum.errors import program
from fastmum.evaluate.depth import DepthSettings
from fastmum.evaluate.depth_sets import KINDS
from fastmum.evaluate.matching import TEMPERATURE, ProbeSettings
from fastmum.evaluate.overview import add_arguments
from fastmum.evaluate.pairs import SETS
from fastmum.evaluate.results import OF_RUNS
from fastmum.evaluate.scoring import Protocol
from fastmum.evaluate.views import ViewSettings
from fastmum.pretrained.arguments import SPECS, add_overrides
from fastmum.tasks.depth import HEADS, Loss
from fastmum.tasks.recognition.probes import ClassifierSettings

CPU_STEPS = 200  # of probes without a GPU: minutes
ALL = "all"  # the command that runs every evaluation
TRAIN_PAIRS = 2000  # whose features fit in memory: at most 6 GB for ViT-L at 448 px
FLAGS = {"counts": "views", "evaluate_every": "every"}  # fields of settings whose flags have other names
DEPTH_STEPS, DEPTH_STEPS_CPU = 38_400, 100  # DINOv2's, and minutes on a CPU
CLASSIFIER_STEPS, CLASSIFIER_STEPS_CPU = 12_500, 300  # CAPI's, and minutes on a CPU
CROPS = {"cuda": 0, "cpu": 2}  # random crops of a training image; 0: a new one each time, as CAPI
LEAST = {"max_pairs": 1, "train_pairs": 1, "steps": 1, "every": 1, "pictures": 0, "seed": 0, "crops": 0,
         "train_images": 2, "seeds": 1}  # fmt: skip
CACHE = "folder to keep features in, and to read them from the next time (default: none)"
_SETS = "\n".join(f"  {name:11}{layout.meaning}" for name, layout in SETS.items())
_EPILOG = f"""\
{SPECS}

DATA is scenes or motorcycle, which need no files; a path, whose kind is detected; or KIND:/path. Kinds:
{_SETS}

The evaluation `reconstruction` takes runs of that task, and scenes, a manifest, or KIND:/path with a kind of
`fastmum data build`: co3d_test, realestate10k_test, dtu, eth3d, ...

The evaluation `depth` takes {KINDS}.

The evaluation `recognition` takes scenes (kinds of rooms), a folder with train/ and val/ of class folders, or imagenet,
inaturalist, sun397, places; `segmentation` takes scenes, ade20k or voc. Folders, tar, zip: docs/recognition.md.

The evaluations `pose` and `roma` take runs of those tasks, and the same DATA as matching.

The evaluation `views` takes scenes, or any folder whose sub-folders are sequences of images.

DIR collects results: every evaluation adds a .json and pictures; report.html and table.md show all of them next to the
paper's numbers. docs/evaluation.md describes the protocols.
"""


def make_parser(evaluations: Mapping[str, str]) -> argparse.ArgumentParser:
    """The parser, of the texts of all evaluations; `args.task` is one of them, or `ALL`."""
    description = (
        "Measure correspondence between views: matching by linear probe, by cosine similarity of features, and by the "
        "decoder's attention; the effect of other views on the masked loss; recognition of classes and segmentation by "
        "probes; depth of single images; and reconstruction, relative pose and dense matching by runs of those tasks."
    )
    common: dict[str, Any] = {"epilog": _EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog=program("fastmum.evaluate"), description=description, **common)
    commands = parser.add_subparsers(dest="task", required=True, metavar="|".join([*evaluations, ALL]))
    for task, text in evaluations.items():
        command = commands.add_parser(task, help=text, description=f"{text[0].upper()}{text[1:]}.", **common)
        _add_weights(command)
        _add_shared(command)
        if task in ("matching", "discriminant"):
            _add_training_pairs(command)
        if task == "matching":
            paper, author = (ProbeSettings.of(protocol).steps for protocol in get_args(Protocol))
            _add_training(command, ProbeSettings(), f"{paper:,}, matchbench {author:,}, without a GPU {CPU_STEPS}")
            every = "steps between evaluations (default: a tenth of --steps)"
            command.add_argument("--every", type=int, metavar="N", help=every)
        if task == "depth":
            _add_depth(command)
        if task == "views":
            _add_views(command)
        if task in OF_RUNS:
            command.add_argument("--encoder", metavar="SPEC", help="weights of the encoder, if they were moved")
        if task == "reconstruction":
            square = "resize to squares, as Poincar3 does with RealEstate10K and CO3D (default: keep the aspect ratio)"
            command.add_argument("--square", action="store_true", help=square)
        if task == "roma":
            command.add_argument("--no-pose", action="store_true", help="dense warps only, which needs no OpenCV")
        if task in ("matching", "cosine"):
            protocol = "patches: patch centres are scored; matchbench: every pixel, as the author runs it (%(default)s)"
            command.add_argument("--protocol", choices=get_args(Protocol), default="patches", help=protocol)
        if task == "recognition":
            _add_classifiers(command)
        if task == "segmentation":
            images = "images to train on, evenly spread (default: all)"
            command.add_argument("--train-images", type=int, metavar="N", help=images)
        if task in ("matching", "discriminant", "cosine"):
            temperature = "of the matcher (%(default)s)"
            command.add_argument("--temperature", type=float, default=TEMPERATURE, metavar="T", help=temperature)
        if task in ("matching", "discriminant", "cosine", "recognition", "segmentation"):
            command.add_argument("--cache", type=Path, metavar="DIR", help=CACHE)
    text = "every evaluation that the data at hand allows, of several encoders, on one page"
    command = commands.add_parser(ALL, help=text, description=f"{text[0].upper()}{text[1:]}.", **common)
    add_arguments(command, list(evaluations))
    _add_shared(command)
    return parser


def _add_weights(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", required=True, metavar="W", help="weights to evaluate, see below")
    add_overrides(parser, "--override", more=", or patch_size=8: the patches are resampled")
    add("--name", metavar="NAME", help="of the weights in the table (default: that of the run or file)")
    add("--data", default="scenes", metavar="DATA", help="data to evaluate on, see below (%(default)s)")


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    size = "side of the resized pictures (256 for scenes, 512 for NAVI, 224 for images and folders of sequences, else "
    size += "448; depth: the longer side, default: the protocol's)"
    pairs = "evaluate on N pairs (views: frames, reconstruction: sequences, recognition, segmentation, depth: images), "
    pairs += "evenly spread (default: all)"
    seed = "of random weights, of the order of training pairs, and of masks (%(default)s)"
    add("--out", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="folder of results (%(default)s)")
    add("--size", type=int, metavar="PX", help=size)
    add("--max-pairs", type=int, metavar="N", help=pairs)
    add("--pictures", type=int, default=4, metavar="N", help="pairs to draw (%(default)s)")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help=seed)


def _add_training_pairs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--train-data", metavar="DATA", help="pairs to train on (default: other scenes of --data)")
    add("--train-pairs", type=int, default=TRAIN_PAIRS, metavar="N", help="maximum number (%(default)s)")


def _add_training(parser: argparse.ArgumentParser, defaults: ProbeSettings | DepthSettings, steps: str) -> None:
    add = parser.add_argument_group("training of the probes").add_argument
    rates, decays = (" ".join(map(str, each)) for each in (defaults.learning_rates, defaults.weight_decays))
    author = "; matchbench: its own" if isinstance(defaults, ProbeSettings) else ""
    probes = f"each combination with a weight decay makes a probe (default: {rates}{author})"
    add("--steps", type=int, metavar="N", help=f"default: {steps}")
    choice = "where the best probe is chosen: on the test set, as the paper does in matching, or on left-out training "
    choice += "scenes (%(default)s)"
    on = "test" if isinstance(defaults, ProbeSettings) else "train"
    add("--choose-on", choices=("test", "train"), default=on, help=choice)
    add("--batch", type=int, default=defaults.batch, metavar="N", help="pairs, or images, a step (%(default)s)")
    add("--learning-rates", type=float, nargs="+", metavar="LR", help=probes)
    add("--weight-decays", type=float, nargs="+", metavar="WD", help=f"default: {decays}{author}")


def _add_depth(parser: argparse.ArgumentParser) -> None:
    defaults, add = DepthSettings(), parser.add_argument
    _add_training(parser, defaults, f"{DEPTH_STEPS:,} as in DINOv2, {DEPTH_STEPS_CPU} without a GPU")
    heads = (
        f"of {', '.join(HEADS)}, each with every rate and decay (default: lin1 and lin4, without a CLS token *-nocls)"
    )
    versions = "augmented versions of each training image, encoded once (default: 1; 0, new ones for ever, on a GPU)"
    add("--train-data", metavar="DATA", help="images to train on (default: other images of --data)")
    add("--heads", nargs="+", metavar="HEAD", help=heads)
    add("--loss", choices=get_args(Loss), default=defaults.loss, help="besides that of gradients (%(default)s)")
    add("--versions", type=int, metavar="N", help=versions)
    add("--cache", type=Path, metavar="DIR", help=CACHE)


def _add_classifiers(parser: argparse.ArgumentParser) -> None:
    defaults, add = ClassifierSettings(), parser.add_argument_group("training of the probes").add_argument
    rates, decays = defaults.learning_rates, defaults.weight_decays
    steps = f"default: {CLASSIFIER_STEPS:,} as CAPI, {CLASSIFIER_STEPS_CPU} without a GPU"
    crops = "random crops of each training image, of which features are computed once; 0: a new crop each time, as CAPI"
    labels = "JSON with the classes of the test images, or lists of them (ImageNet ReaL), see docs/recognition.md"
    add("--steps", type=int, metavar="N", help=steps)
    add("--batch", type=int, default=defaults.batch, metavar="N", help="images a step (%(default)s)")
    add("--learning-rates", type=float, nargs="+", default=rates, metavar="LR", help="for 256 images (%(default)s)")
    add("--weight-decays", type=float, nargs="+", default=decays, metavar="WD", help="(%(default)s)")
    add("--crops", type=int, metavar="N", help=f"{crops} (default; without a GPU {CROPS['cpu']})")
    add("--labels", metavar="FILE", help=labels)


def _add_views(parser: argparse.ArgumentParser) -> None:
    defaults, add = ViewSettings(), parser.add_argument_group("views").add_argument
    ratio = "share of masked patches in every frame (%(default)s)"
    add("--views", type=int, nargs="+", default=defaults.counts, metavar="S", help="numbers of views (%(default)s)")
    add("--mask-ratio", type=float, default=defaults.mask_ratio, metavar="R", help=ratio)
    add("--gap", type=int, default=defaults.gap, metavar="N", help="steps between neighbours (%(default)s)")
    add("--masks", type=int, default=defaults.masks, metavar="N", help="masks of every frame (%(default)s)")


def check(args: Namespace) -> None:
    """Check the numbers that the settings don't check, or only after the weights are loaded."""
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise DataError(f"--{name.replace('_', '-')} is {value}, but must be at least {least}")
    if not 0 < getattr(args, "temperature", 1.0) < float("inf"):
        raise DataError(f"--temperature is {args.temperature}, but must be positive")
