"""Evaluate weights: `python -m fastmum.evaluate EVALUATION --weights W --data D [--out DIR]`."""

import argparse
import contextlib
import logging
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import torch
from PIL import Image

import fastmum
from fastmum.data.errors import DataError
from fastmum.engine.device import pick_device
from fastmum.errors import FastmumError, program, run_command, some_names, writing
from fastmum.evaluate import evaluate_attention, evaluate_cosine, evaluate_discriminant, evaluate_matching
from fastmum.evaluate.depth import DepthSettings, evaluate_depth, open_cache
from fastmum.evaluate.depth_sets import KINDS, open_depth
from fastmum.evaluate.features import check_size, patch_size
from fastmum.evaluate.images import open_images, relabel
from fastmum.evaluate.maps import open_maps
from fastmum.evaluate.matching import TEMPERATURE, ProbeSettings, Result
from fastmum.evaluate.overview import add_arguments, overview, run_all
from fastmum.evaluate.pairs import SETS, Pair, PairSet, open_pairs, overlap, same_set
from fastmum.evaluate.pairs.pair import evenly
from fastmum.evaluate.pictures import draw_attention, draw_views, draw_warp
from fastmum.evaluate.pose import evaluate_pose
from fastmum.evaluate.recognition import evaluate_recognition, evaluate_segmentation
from fastmum.evaluate.reconstruction import evaluate_reconstruction, open_set
from fastmum.evaluate.records import MATCHING, Record, check_free, make_folder, printable, read, save
from fastmum.evaluate.results import NOTE, OF_RUNS, page, table
from fastmum.evaluate.roma import evaluate_roma
from fastmum.evaluate.scoring import Protocol
from fastmum.evaluate.views import ViewSettings, evaluate_views, open_sequences, target_batch
from fastmum.features.probe import Probe, of_encoder, write_probe
from fastmum.files import expand_user, write_atomic
from fastmum.model.encoder import Encoder
from fastmum.pretrained.arguments import SPECS, add_overrides, parse_overrides
from fastmum.pretrained.load import RANDOM, build, read_pretrained
from fastmum.progress import progress_bar
from fastmum.tasks.depth import HEADS, LINEAR, Loss
from fastmum.tasks.pose import infer as pose
from fastmum.tasks.recognition.probes import ClassifierSettings
from fastmum.tasks.reconstruction import infer as reconstruction
from fastmum.tasks.roma import infer as roma

T = TypeVar("T")

CPU_STEPS = 200  # of probes without a GPU: minutes
ALL = "all"  # the command that runs every evaluation
TRAIN_PAIRS = 2000  # whose features fit in memory: at most 6 GB for ViT-L at 448 px
FLAGS = {"counts": "views", "evaluate_every": "every"}  # fields of settings whose flags have other names
ENCODER_ONLY = ("depth", "recognition", "segmentation")  # evaluations that need no decoder
DEPTH_STEPS, DEPTH_STEPS_CPU = 38_400, 100  # DINOv2's, and minutes on a CPU
CLASSIFIER_STEPS, CLASSIFIER_STEPS_CPU = 12_500, 300  # CAPI's, and minutes on a CPU
CROPS = {"cuda": 0, "cpu": 2}  # random crops of a training image; 0: a new one each time, as CAPI
IMAGE_SIZE = 224  # of recognition and segmentation, CAPI's
LEAST = {"max_pairs": 1, "train_pairs": 1, "steps": 1, "every": 1, "pictures": 0, "seed": 0, "crops": 0,
         "train_images": 2, "seeds": 1}  # fmt: skip
REMEDIES = {"matching": "lower --batch, --size or the number of --learning-rates", "views": "lower --size or --views",
            "depth": "lower --batch", "recognition": "lower --batch or --size"}  # fmt: skip
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

Claim = Callable[[str], None]  # checks, by the name of the set, that a result would not replace another one


class Evaluated(NamedTuple):
    """What an evaluation returns."""

    set: str  # its name
    numbers: dict[str, Any]
    pictures: list[Image.Image]
    probe: Probe | None = None  # for `fastmum predict`


def make_parser() -> argparse.ArgumentParser:
    """The parser; `args.task` is a key of `EVALUATIONS`."""
    description = (
        "Measure correspondence between views: matching by linear probe, by cosine similarity of features, and by the "
        "decoder's attention; the effect of other views on the masked loss; recognition of classes and segmentation by "
        "probes; depth of single images; and reconstruction, relative pose and dense matching by runs of those tasks."
    )
    common: dict[str, Any] = {"epilog": _EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog=program("fastmum.evaluate"), description=description, **common)
    commands = parser.add_subparsers(dest="task", required=True, metavar="|".join([*EVALUATIONS, ALL]))
    for task, (text, _) in EVALUATIONS.items():
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
    add_arguments(command, list(EVALUATIONS))
    _add_shared(command)
    return parser


def _add_weights(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", required=True, metavar="W", help="weights to evaluate, see below")
    add_overrides(parser, "--override", more=", or a size of an untrained model, such as patch_size=8")
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
    choice = "where the best probe is chosen: on the test set, as in the paper, or on left-out scenes (%(default)s)"
    add("--choose-on", choices=("test", "train"), default="test", help=choice)
    add("--batch", type=int, default=defaults.batch, metavar="N", help="pairs, or images, a step (%(default)s)")
    add("--learning-rates", type=float, nargs="+", metavar="LR", help=probes)
    add("--weight-decays", type=float, nargs="+", metavar="WD", help=f"default: {decays}{author}")


def _sweep(args: Namespace, defaults: ProbeSettings | DepthSettings) -> dict[str, Any]:
    """Learning rates and weight decays, by default those of the settings."""
    names = "learning_rates", "weight_decays"
    return {name: tuple(getattr(defaults if getattr(args, name) is None else args, name)) for name in names}


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
    parser = make_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")

    def run() -> None:
        if args.task == ALL:
            _run_all(parser, args)
        else:
            with _remedies(args.task):
                _run(args)

    return run_command(run)


@contextlib.contextmanager
def _remedies(task: str) -> Iterator[None]:
    """Turn errors of the device's memory and of divergence into a `FastmumError` of one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        remedy = f"{REMEDIES.get(task, 'lower --size')}, or use --device cpu"
        raise FastmumError(f"the memory of the device is too small: {remedy}") from None
    except FloatingPointError as error:
        raise FastmumError(str(error)) from None


def _run(args: Namespace) -> None:
    saved, out = _evaluate(args), expand_user(args.out)
    text = _write_tables(out)
    print(f"{text}\n{NOTE}\n\n{saved.file}\n{out / 'report.html'}")


def _run_all(parser: argparse.ArgumentParser, args: Namespace) -> None:
    _check(args)

    def evaluate(own: Namespace) -> None:
        with _remedies(own.task):
            _evaluate(own)

    not_run = run_all(parser, list(EVALUATIONS), args, evaluate)
    out = expand_user(args.out)
    found, notes = overview(record.content for record in read(out))
    notes += not_run
    _write_tables(out, overview=found, notes=notes)
    with writing(out, DataError):
        write_atomic(out / "overview.md", "\n".join([found.markdown(), *(f"- {note}" for note in notes), ""]))
    print("\n".join([found.markdown(), *notes, str(out / "overview.md"), str(out / "report.html")]))


def _write_tables(out: Path, **more: Any) -> str:
    """Write table.md and report.html of all results in a folder; returns the table."""
    records = read(out)
    text = table(records).markdown()
    with writing(out, DataError):
        write_atomic(out / "table.md", f"{text}\n{NOTE}\n")
        write_atomic(out / "report.html", page(records, **more))
    return text


def _evaluate(args: Namespace) -> Record:
    """Run an evaluation and save its results."""
    _check(args)
    out = expand_user(args.out)
    make_folder(out)
    read(out)  # the page needs every result; fail before the evaluation
    overrides = _overrides(args)
    device = pick_device(args.device, key="--device")
    weights: dict[str, Any]
    model: Any
    if args.task in OF_RUNS:
        weights, model = _load_run(args, device)
        encoder = model.model.encoder
    else:
        weights, model = load_weights(args.weights, args.name, device, overrides)
        encoder = model
    if getattr(args, "number", None) is not None:  # of several seeds
        weights["weights"] += f" {args.number}"
    if args.size is not None:
        check_size(encoder, args.size)
    protocol = {"protocol": getattr(args, "protocol", "patches")} if args.task in MATCHING else {}
    about = printable({"task": args.task, "set": "", **weights, "data": args.data, **protocol})
    _, evaluate = EVALUATIONS[args.task]
    set_name, numbers, pictures, probe = evaluate(args, model, lambda name: check_free(out, about | {"set": name}))
    about |= {"set": set_name, "fastmum": fastmum.__version__, "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    saved = save(out, about | numbers, pictures)
    if probe is not None:
        write_probe(saved.file.with_suffix(".safetensors"), probe)
    return saved


def _overrides(args: Namespace) -> dict[str, Any]:
    """Of the weights; probes of single images do without the decoder."""
    overrides = parse_overrides(args.overrides, {"device": "--device"})
    seeded = {"seed": args.seed} if args.weights.startswith(f"{RANDOM}:") else {}
    return seeded | overrides | ({"encoder_only": True} if args.task in ENCODER_ONLY else {})


def load_weights(
    spec: str, name: str | None, device: torch.device, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], Encoder]:
    """Fields of a record of results that say what the weights are, and the model in eval mode.

    `spec` and `overrides` are those of `fastmum.load_pretrained`; the name is by default that of the weights. Raises
    `WeightsError`.
    """
    dtype = overrides.get("dtype", torch.float32)
    pretrained = read_pretrained(spec, **{key: value for key, value in overrides.items() if key != "dtype"})
    about = {"weights": name or pretrained.name, "source": spec, "frames": pretrained.frames}
    return about | {"encoder": pretrained.about}, build(pretrained, device, dtype)


def _matching(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    defaults, on_gpu = ProbeSettings.of(args.protocol), next(model.parameters()).device.type == "cuda"
    steps = args.steps or (defaults.steps if on_gpu else CPU_STEPS)
    more: dict[str, Any] = {"steps": steps, "evaluate_every": args.every or max(1, steps // 10)}
    more |= _sweep(args, defaults)
    settings = _settings(ProbeSettings, args, ("batch", "temperature", "seed", "protocol"), **more)
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
    matchbench = getattr(args, "protocol", "") == "matchbench"
    pairs = open_pairs(args.data, "all" if separate else "test", matchbench=matchbench)
    train = open_pairs(args.train_data, "trainable") if separate else open_pairs(args.data, "train")
    if separate and (shared := overlap(train, pairs)):
        raise DataError(
            f"--train-data '{args.train_data}' and --data '{args.data}' share {shared}; name a --train-data that is "
            "not tested on"
        )
    claim(pairs.name)
    return pairs.first(args.max_pairs), train.first(args.train_pairs)


def _cosine(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    pairs = open_pairs(args.data, matchbench=args.protocol == "matchbench").first(args.max_pairs)
    claim(pairs.name)
    result = evaluate_cosine(model, pairs, args.size, args.temperature, args.cache, args.protocol)
    return _with_pictures(args, pairs, result)


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
    return Evaluated(
        pairs.name, {"pairs": len(pairs.pairs), "set_pairs": pairs.of or len(pairs.pairs)} | result.numbers, few
    )


def _views(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    settings = _settings(ViewSettings, args, ("mask_ratio", "gap", "masks", "seed"), counts=tuple(args.views))
    sequences = open_sequences(args.data, settings.least)
    claim(sequences.name)
    result = evaluate_views(model, sequences, settings, args.size, args.max_pairs)
    patches = (result.size // patch_size(model)) ** 2
    few = evenly(list(result.targets), args.pictures)
    batches = (target_batch(sequences, target, settings, result.size, patches) for target in few)
    drawn = [draw_views(model, batch, settings.mask_ratio) for batch in batches]
    return Evaluated(sequences.name, result.numbers, drawn)


def _recognition(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    device = next(model.parameters()).device.type
    steps = args.steps or (CLASSIFIER_STEPS if device == "cuda" else CLASSIFIER_STEPS_CPU)
    sweep = {"learning_rates": tuple(args.learning_rates), "weight_decays": tuple(args.weight_decays)}
    seed = ClassifierSettings.seed + args.seed
    settings = _settings(ClassifierSettings, args, ("batch",), steps=steps, seed=seed, **sweep)
    images = open_images(args.data)
    claim(images.name)
    if args.labels:
        relabel(images, expand_user(args.labels))
    crops = (CROPS[device] if args.crops is None else args.crops) or None
    found = evaluate_recognition(
        model, images, settings, args.size or IMAGE_SIZE, crops, args.max_pairs, args.cache, args.pictures
    )
    return _of_images(images.name, found.numbers, found.pictures)


def _segmentation(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    maps = open_maps(args.data)
    claim(maps.name)
    size = args.size or IMAGE_SIZE
    found = evaluate_segmentation(
        model, maps, size, args.max_pairs, args.train_images, args.cache, pictures=args.pictures
    )
    return _of_images(maps.name, found.numbers, found.pictures)


def _of_images(name: str, numbers: dict[str, Any], pictures: list[Image.Image]) -> Evaluated:
    """Say how many images were skipped."""
    if numbers["skipped"] or numbers["not_scored"]:
        skipped = f"{numbers['skipped']} images could not be read, {numbers['not_scored']} test images are not scored"
        print(f"{name}: {skipped}", file=sys.stderr)
    return Evaluated(name, numbers, pictures)


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
    return Evaluated(pairs.name, scored.numbers, scored.pictures)


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
    return Evaluated(name, scored.numbers, scored.pictures)


def _depth(args: Namespace, encoder: Any, claim: Claim) -> Evaluated:
    on_gpu = next(encoder.parameters()).device.type == "cuda"
    steps, versions = args.steps or (DEPTH_STEPS if on_gpu else DEPTH_STEPS_CPU), args.versions
    heads = tuple(args.heads or (name for name in LINEAR if HEADS[name].cls == encoder.options.cls))
    versions = int(not on_gpu) if versions is None else versions
    more = {"steps": steps, "versions": versions, "heads": heads, **_sweep(args, DepthSettings())}
    settings = _settings(DepthSettings, args, ("batch", "loss", "seed"), **more)
    test, train = (open_depth(name, part).resized(args.size) for name, part in (
        (args.data, "test"), (args.train_data or args.data, "train"))
    )  # fmt: skip
    if shared := {frame.file for frame in train.frames} & {frame.file for frame in test.frames} - {None}:
        raise DataError(f"--train-data and --data share '{min(map(str, shared))}'; name a --train-data of other images")
    claim(test.name)
    with tempfile.TemporaryDirectory(prefix="fastmum-") as folder:
        cache = open_cache(args.cache or Path(folder), encoder) if args.cache or versions else None
        result = evaluate_depth(
            encoder, test, train, settings, args.choose_on == "train", cache, args.max_pairs, args.pictures
        )
    for data, part in ((test, "test"), (train, "training")):
        if data.skipped:
            why = some_names([f"{name} ({reason})" for name, reason in data.skipped.items()], 3)
            print(f"{data.name}: {len(data.skipped)} {part} images are skipped: {why}", file=sys.stderr)
    used = of_encoder(encoder, args.weights, _overrides(args))
    about = {"task": "depth", **used, **result.best.about(), "loss": settings.loss, "size": result.longest}
    about |= {"max_depth": train.protocol.max_depth}
    return Evaluated(test.name, result.numbers, result.pictures, Probe(result.best.head.state_dict(), about))


def _roma(args: Namespace, trained: roma.Trained, claim: Claim) -> Evaluated:
    pairs = open_pairs(args.data).first(args.max_pairs)
    claim(pairs.name)
    few = pairs.first(args.pictures).pairs if args.pictures else []
    scored = evaluate_roma(trained, pairs, args.size, not args.no_pose, few, args.seed)
    counts = {"pairs": len(pairs.pairs), "set_pairs": pairs.of or len(pairs.pairs)}
    return Evaluated(pairs.name, counts | scored.numbers, scored.pictures)


EVALUATIONS: dict[str, tuple[str, Callable[[Namespace, Any, Claim], Evaluated]]] = {
    "matching": ("dense matching by linear probes, trained in one pass on frozen features", _matching),
    "discriminant": ("the same by a probe in closed form, the linear discriminant of true matches", _discriminant),
    "cosine": ("matching by cosine similarity of features, with and without the last LayerNorm", _cosine),
    "attention": ("matching by the decoder's attention across views, with pictures", _attention),
    "views": ("masked loss of the same frames with more and more views, and with views of other scenes", _views),
    "recognition": ("classes of images by attentive and linear probes on frozen features, as CAPI", _recognition),
    "segmentation": ("labels of pixels by k-NN and logistic regression on frozen features, as CAPI", _segmentation),
    "reconstruction": ("cameras and points of a run of reconstruction, with pictures", _reconstruction),
    "depth": ("depth of single images by linear heads on frozen features, for `fastmum predict`", _depth),
    "pose": ("relative poses of a run of pose, with pictures", _pose),
    "roma": ("dense warps and relative poses by a run of RoMa, with pictures", _roma),
}


if __name__ == "__main__":
    sys.exit(main())
