"""Evaluate weights: `python -m fastmum.evaluate EVALUATION --weights W --data D [--out DIR]`."""

import argparse
import logging
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

import fastmum
from fastmum.data.errors import DataError
from fastmum.engine.device import pick_device
from fastmum.errors import FastmumError, program, run_command, writing
from fastmum.evaluate import evaluate_attention, evaluate_cosine, evaluate_discriminant, evaluate_matching
from fastmum.evaluate.features import check_size, patch_size
from fastmum.evaluate.matching import TEMPERATURE, ProbeSettings, Result
from fastmum.evaluate.pairs import SETS, Pair, PairSet, open_pairs, overlap, same_set
from fastmum.evaluate.pairs.pair import evenly
from fastmum.evaluate.pictures import draw_attention, draw_views, draw_warp
from fastmum.evaluate.pose import evaluate_pose
from fastmum.evaluate.reconstruction import evaluate_reconstruction, open_set
from fastmum.evaluate.records import check_free, make_folder, printable, read, save
from fastmum.evaluate.results import NOTE, OF_RUNS, page, table
from fastmum.evaluate.roma import evaluate_roma
from fastmum.evaluate.views import ViewSettings, evaluate_views, open_sequences, target_batch
from fastmum.files import expand_user, write_atomic
from fastmum.model.encoder import Encoder
from fastmum.pretrained.arguments import SPECS, add_overrides, parse_overrides
from fastmum.pretrained.load import RANDOM, build, read_pretrained
from fastmum.progress import progress_bar
from fastmum.tasks.pose import infer as pose
from fastmum.tasks.reconstruction import infer as reconstruction
from fastmum.tasks.roma import infer as roma

T = TypeVar("T")

STEPS = {"cuda": 25_000, "cpu": 200}  # the paper's (supplement, section B), and minutes on a CPU
TRAIN_PAIRS = 2000  # whose features fit in memory: at most 6 GB for ViT-L at 448 px
FLAGS = {"counts": "views", "evaluate_every": "every"}  # fields of settings whose flags have other names
LEAST = {"max_pairs": 1, "train_pairs": 1, "steps": 1, "every": 1, "pictures": 0, "seed": 0}
REMEDIES = {"matching": "lower --batch, --size or the number of --learning-rates", "views": "lower --size or --views"}
_SETS = "\n".join(f"  {name:11}{layout.meaning}" for name, layout in SETS.items())
_EPILOG = f"""\
{SPECS}

DATA is scenes or motorcycle, which need no files; a path, whose kind is detected; or KIND:/path. Kinds:
{_SETS}

The evaluation `reconstruction` takes runs of that task, and scenes, a manifest, or KIND:/path with a kind of
`fastmum data build`: co3d_test, realestate10k_test, dtu, eth3d, ...

The evaluation `pose` takes runs of that task.
The evaluation `roma` takes runs of that task, and the same DATA as matching.

The evaluation `views` takes scenes, or any folder whose sub-folders are sequences of images.

DIR collects results: every evaluation adds a .json and pictures; report.html and table.md show all of them next to the
paper's numbers. docs/evaluation.md describes the protocols.
"""

Claim = Callable[[str], None]  # checks, by the name of the set, that a result would not replace another one
Evaluated = tuple[str, dict[str, Any], list[Image.Image]]  # name of the set, numbers, pictures


def make_parser() -> argparse.ArgumentParser:
    """The parser; `args.task` is a key of `EVALUATIONS`."""
    description = (
        "Measure correspondence between views: matching by linear probe, by cosine similarity of features, and by the "
        "decoder's attention; the effect of other views on the masked loss; and reconstruction and relative pose by "
        "runs of those tasks."
    )
    common: dict[str, Any] = {"epilog": _EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog=program("fastmum.evaluate"), description=description, **common)
    commands = parser.add_subparsers(dest="task", required=True, metavar="|".join(EVALUATIONS))
    for task, (text, _) in EVALUATIONS.items():
        command = commands.add_parser(task, help=text, description=f"{text[0].upper()}{text[1:]}.", **common)
        _add_shared(command)
        if task in ("matching", "discriminant"):
            _add_training_pairs(command)
        if task == "matching":
            _add_training(command)
        if task == "views":
            _add_views(command)
        if task in OF_RUNS:
            command.add_argument("--encoder", metavar="SPEC", help="weights of the encoder, if they were moved")
        if task == "reconstruction":
            square = "resize to squares, as Poincar3 does with RealEstate10K and CO3D (default: keep the aspect ratio)"
            command.add_argument("--square", action="store_true", help=square)
        if task == "roma":
            command.add_argument("--no-pose", action="store_true", help="dense warps only, which needs no OpenCV")
        if task in ("matching", "discriminant", "cosine"):
            temperature = "of the matcher (%(default)s)"
            command.add_argument("--temperature", type=float, default=TEMPERATURE, metavar="T", help=temperature)
            cache = "folder to keep features in, and to read them from the next time (default: none)"
            command.add_argument("--cache", type=Path, metavar="DIR", help=cache)
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    weights = "weights to evaluate, see below"
    size = "side of the resized pictures (256 for scenes, 512 for NAVI, 224 for folders of sequences, else 448)"
    pairs = "evaluate on N pairs (views: frames, reconstruction: sequences), evenly spread over the set (default: all)"
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


def _add_training_pairs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--train-data", metavar="DATA", help="pairs to train on (default: other scenes of --data)")
    add("--train-pairs", type=int, default=TRAIN_PAIRS, metavar="N", help="maximum number (%(default)s)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    defaults, add = ProbeSettings(), parser.add_argument_group("training of the probes").add_argument
    rates, decays = defaults.learning_rates, defaults.weight_decays
    steps = f"default: {STEPS['cuda']:,} as in the paper, {STEPS['cpu']} without a GPU"
    probes = "each combination with a weight decay makes a probe (%(default)s)"
    add("--steps", type=int, metavar="N", help=steps)
    add("--every", type=int, metavar="N", help="steps between evaluations (default: a tenth of --steps)")
    choice = "where the best probe and step are chosen: test pairs, as in the paper, or left-out scenes (%(default)s)"
    add("--choose-on", choices=("test", "train"), default="test", help=choice)
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


def _check(args: Namespace) -> None:
    """Check the numbers that the settings don't check, or only after the weights are loaded."""
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise DataError(f"--{name.replace('_', '-')} is {value}, but must be at least {least}")
    if not 0 < getattr(args, "temperature", 1.0) < float("inf"):
        raise DataError(f"--temperature is {args.temperature}, but must be positive")


def _settings(kind: type[T], args: Namespace, names: Sequence[str], **more: Any) -> T:
    """Settings from the arguments `names` and other fields; errors name the flag instead of the field."""
    try:
        return kind(**{name: getattr(args, name) for name in names}, **more)
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        raise DataError(f"--{FLAGS.get(field, field).replace('_', '-')} {rest}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")

    def run() -> None:
        try:
            _run(args)
        except torch.OutOfMemoryError:
            remedy = f"{REMEDIES.get(args.task, 'lower --size')}, or use --device cpu"
            raise FastmumError(f"the memory of the device is too small: {remedy}") from None
        except FloatingPointError as error:
            raise FastmumError(str(error)) from None

    return run_command(run)


def _run(args: Namespace) -> None:
    _check(args)
    out = expand_user(args.out)
    make_folder(out)
    read(out)  # the page needs every result; fail before the evaluation
    overrides = parse_overrides(args.overrides, {"device": "--device"})
    device = pick_device(args.device, key="--device")
    weights: dict[str, Any]
    model: Any
    if args.task in OF_RUNS:
        weights, model = _load_run(args, device)
        encoder = model.model.encoder
    else:
        weights, model = load_weights(args.weights, args.name, device, overrides, args.seed)
        encoder = model
    if args.size is not None:
        check_size(encoder, args.size)
    about = printable({"task": args.task, "set": "", **weights, "data": args.data})
    _, evaluate = EVALUATIONS[args.task]
    set_name, numbers, pictures = evaluate(args, model, lambda name: check_free(out, about | {"set": name}))
    about |= {"set": set_name, "fastmum": fastmum.__version__, "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    saved = save(out, about | numbers, pictures)
    records = read(out)
    text = f"{table(records).markdown()}\n{NOTE}\n"
    with writing(out, DataError):
        write_atomic(out / "table.md", text)
        write_atomic(out / "report.html", page(records))
    print(f"{text}\n{saved.file}\n{out / 'report.html'}")


def load_weights(
    spec: str, name: str | None, device: torch.device, overrides: Mapping[str, Any], seed: int = 0
) -> tuple[dict[str, Any], Encoder]:
    """Fields of a record of results that say what the weights are, and the model in eval mode.

    `spec` and `overrides` are those of `fastmum.load_pretrained`; the name is by default that of the weights. `seed` is
    that of random weights. Raises `WeightsError`.
    """
    dtype, seeded = overrides.get("dtype", torch.float32), {"seed": seed} if spec.startswith(f"{RANDOM}:") else {}
    pretrained = read_pretrained(spec, **seeded | {key: value for key, value in overrides.items() if key != "dtype"})
    about = {"weights": name or pretrained.name, "source": spec, "frames": pretrained.frames}
    return about | {"encoder": pretrained.about}, build(pretrained, device, dtype)


def _matching(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    steps = args.steps or STEPS[next(model.parameters()).device.type]
    rates, decays, every = tuple(args.learning_rates), tuple(args.weight_decays), args.every or max(1, steps // 10)
    more = {"steps": steps, "evaluate_every": every, "learning_rates": rates, "weight_decays": decays}
    settings = _settings(ProbeSettings, args, ("batch", "temperature", "seed"), **more)
    pairs, train = _open_both(args, claim)
    return _with_pictures(
        args, pairs, evaluate_matching(model, pairs, train, settings, args.size, args.choose_on == "train", args.cache)
    )


def _discriminant(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    pairs, train = _open_both(args, claim)
    return _with_pictures(
        args, pairs, evaluate_discriminant(model, pairs, train, args.size, args.temperature, args.cache)
    )


def _open_both(args: Namespace, claim: Claim) -> tuple[PairSet, PairSet]:
    """Pairs to evaluate on and to train on; `DataError` if they share a frame."""
    separate = args.train_data is not None and not same_set(args.train_data, args.data)
    pairs = open_pairs(args.data, "all" if separate else "test")
    train = open_pairs(args.train_data, "trainable") if separate else open_pairs(args.data, "train")
    if separate and (shared := overlap(train, pairs)):
        raise DataError(
            f"--train-data '{args.train_data}' and --data '{args.data}' share {shared}; name a --train-data that is "
            "not tested on"
        )
    claim(pairs.name)
    return pairs.first(args.max_pairs), train.first(args.train_pairs)


def _cosine(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    pairs = open_pairs(args.data).first(args.max_pairs)
    claim(pairs.name)
    return _with_pictures(args, pairs, evaluate_cosine(model, pairs, args.size, args.temperature, args.cache))


def _attention(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    pairs = open_pairs(args.data).first(args.max_pairs)
    claim(pairs.name)
    result = evaluate_attention(model, pairs, args.size)
    return _with_pictures(args, pairs, result, lambda pair: draw_attention(model, pair, result.size))


def _with_pictures(
    args: Namespace, pairs: PairSet, result: Result, draw: Callable[[Pair], Image.Image] | None = None
) -> Evaluated:
    """Draw a few pairs, by default their warps; there are no pictures of recall, which estimates no warps."""
    few, warps = [], result.warps
    if args.pictures and warps is not None:
        draw = draw or (lambda pair: draw_warp(pair, warps[pairs.pairs.index(pair)], result.size))
        first = pairs.first(args.pictures).pairs
        few = [draw(each) for each in progress_bar(first, desc="drawing", unit="pair", leave=False)]
    return pairs.name, {"pairs": len(pairs.pairs), "set_pairs": pairs.of or len(pairs.pairs)} | result.numbers, few


def _views(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    settings = _settings(ViewSettings, args, ("mask_ratio", "gap", "masks", "seed"), counts=tuple(args.views))
    sequences = open_sequences(args.data, settings.least)
    claim(sequences.name)
    result = evaluate_views(model, sequences, settings, args.size, args.max_pairs)
    patches = (result.size // patch_size(model)) ** 2
    few = evenly(list(result.targets), args.pictures)
    batches = (target_batch(sequences, target, settings, result.size, patches) for target in few)
    return sequences.name, result.numbers, [draw_views(model, batch, settings.mask_ratio) for batch in batches]


def _load_run(args: Namespace, device: torch.device) -> tuple[dict[str, Any], Any]:
    """As `load_weights`, for a run of the task that is evaluated."""
    if args.overrides:
        raise DataError("--set changes the weights of an encoder, but those of a run are fixed; --encoder names others")
    load = {"reconstruction": reconstruction, "pose": pose, "roma": roma}[args.task].load_run
    trained: Any = load(args.weights, device, args.encoder)
    about = {"weights": args.name or trained.name, "source": args.weights, "frames": trained.frames}
    return about | {"step": trained.step, "encoder": trained.encoder}, trained


def _pose(args: Namespace, trained: pose.Trained, claim: Claim) -> Evaluated:
    pairs = open_pairs(args.data, needs_depth=False)
    claim(pairs.name)
    scored = evaluate_pose(
        lambda images: pose.estimate(trained.model, images), pairs, args.size or trained.image_size, args.max_pairs,
        args.pictures,
    )  # fmt: skip
    return pairs.name, scored.numbers, scored.pictures


def _reconstruction(args: Namespace, trained: reconstruction.Trained, claim: Claim) -> Evaluated:
    model, patch = trained.model, trained.model.config.patch_size

    with tempfile.TemporaryDirectory(prefix="fastmum-") as folder:
        name, protocol, manifests = open_set(args.data, Path(folder))
        claim(name)
        points = protocol.threshold is not None
        scored = evaluate_reconstruction(
            lambda batch: reconstruction.estimate(model, batch.images, points), manifests, protocol,
            args.size or protocol.size or trained.image_size, patch, not args.square, args.max_pairs, args.pictures,
        )  # fmt: skip
    return name, scored.numbers, scored.pictures


def _roma(args: Namespace, trained: roma.Trained, claim: Claim) -> Evaluated:
    pairs = open_pairs(args.data).first(args.max_pairs)
    claim(pairs.name)
    few = pairs.first(args.pictures).pairs if args.pictures else []
    scored = evaluate_roma(trained, pairs, args.size, not args.no_pose, few, args.seed)
    counts = {"pairs": len(pairs.pairs), "set_pairs": pairs.of or len(pairs.pairs)}
    return pairs.name, counts | scored.numbers, scored.pictures


EVALUATIONS: dict[str, tuple[str, Callable[[Namespace, Any, Claim], Evaluated]]] = {
    "matching": ("dense matching by linear probes, trained in one pass on frozen features", _matching),
    "discriminant": ("the same by a probe in closed form, the linear discriminant of true matches", _discriminant),
    "cosine": ("matching by cosine similarity of features, with and without the last LayerNorm", _cosine),
    "attention": ("matching by the decoder's attention across views, with pictures", _attention),
    "views": ("masked loss of the same frames with more and more views, and with views of other scenes", _views),
    "reconstruction": ("cameras and points of a run of reconstruction, with pictures", _reconstruction),
    "pose": ("relative poses of a run of pose, with pictures", _pose),
    "roma": ("dense warps and relative poses by a run of RoMa, with pictures", _roma),
}


if __name__ == "__main__":
    sys.exit(main())
