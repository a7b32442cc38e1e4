"""The evaluations of `fastmum evaluate`: from arguments and weights to numbers and pictures."""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image

from fastmum.data.errors import DataError
from fastmum.errors import FastmumError, some_reasons
from fastmum.evaluate import evaluate_attention, evaluate_cosine, evaluate_discriminant, evaluate_matching
from fastmum.evaluate.arguments import (
    CLASSIFIER_STEPS,
    CLASSIFIER_STEPS_CPU,
    CPU_STEPS,
    CROPS,
    DEPTH_STEPS,
    DEPTH_STEPS_CPU,
    FLAGS,
)  # fmt: skip
from fastmum.evaluate.depth import DepthSettings, evaluate_depth, open_cache
from fastmum.evaluate.depth_sets import open_depth
from fastmum.evaluate.features import patch_size
from fastmum.evaluate.images import open_images, relabel
from fastmum.evaluate.maps import open_maps
from fastmum.evaluate.matching import ProbeSettings, Result
from fastmum.evaluate.pairs import Pair, PairSet, open_pairs, overlap, same_set
from fastmum.evaluate.pairs.pair import evenly
from fastmum.evaluate.pictures import draw_attention, draw_views, draw_warp
from fastmum.evaluate.pose import evaluate_pose
from fastmum.evaluate.recognition import evaluate_recognition, evaluate_segmentation
from fastmum.evaluate.reconstruction import evaluate_reconstruction, open_set
from fastmum.evaluate.roma import evaluate_roma
from fastmum.evaluate.views import ViewSettings, evaluate_views, open_sequences, target_batch
from fastmum.features.probe import Probe, of_encoder
from fastmum.files import expand_user
from fastmum.model.encoder import Encoder
from fastmum.pretrained.arguments import parse_overrides
from fastmum.pretrained.load import RANDOM, absolute_spec, build, read_pretrained
from fastmum.progress import progress_bar
from fastmum.tasks.depth import HEADS, LINEAR
from fastmum.tasks.pose import infer as pose
from fastmum.tasks.recognition.probes import ClassifierSettings
from fastmum.tasks.reconstruction import infer as reconstruction
from fastmum.tasks.roma import infer as roma

T = TypeVar("T")
ENCODER_ONLY = ("depth", "recognition", "segmentation")  # evaluations that need no decoder
DENSE = "megadepth_dense"  # data of RoMa's dense benchmark, the pairs of matchbench
IMAGE_SIZE = 224  # of recognition and segmentation, CAPI's
Claim = Callable[[str], None]  # checks, by the name of the set, that a result would not replace another one


class Evaluation(NamedTuple):
    """What an evaluation returns."""

    set: str  # its name
    numbers: dict[str, Any]
    pictures: list[Image.Image]
    probe: Probe | None = None  # for `fastmum predict`


def _sweep(args: Namespace, defaults: ProbeSettings | DepthSettings) -> dict[str, Any]:
    """Learning rates and weight decays, by default those of the settings."""
    names = "learning_rates", "weight_decays"
    return {name: tuple(getattr(defaults if getattr(args, name) is None else args, name)) for name in names}


def _settings(kind: type[T], args: Namespace, names: Sequence[str], **more: Any) -> T:
    """Settings from the arguments `names` and other fields; errors name the flag instead of the field."""
    try:
        return kind(**{name: getattr(args, name) for name in names}, **more)
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        raise DataError(f"--{FLAGS.get(field, field).replace('_', '-')} {rest}") from None


def overrides_of(args: Namespace) -> dict[str, Any]:
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


def _matching(args: Namespace, model: Any, claim: Claim) -> Evaluation:
    defaults, on_gpu = ProbeSettings.of(args.protocol), next(model.parameters()).device.type == "cuda"
    steps = args.steps or (defaults.steps if on_gpu else CPU_STEPS)
    more: dict[str, Any] = {"steps": steps, "evaluate_every": args.every or max(1, steps // 10)}
    more |= _sweep(args, defaults)
    settings = _settings(ProbeSettings, args, ("batch", "temperature", "seed", "protocol"), **more)
    pairs, train = _open_both(args, claim)
    return _with_pictures(
        args, pairs, evaluate_matching(model, pairs, train, settings, args.size, args.choose_on == "train", args.cache)
    )


def _discriminant(args: Namespace, model: Any, claim: Claim) -> Evaluation:
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


def _cosine(args: Namespace, model: Any, claim: Claim) -> Evaluation:
    pairs = open_pairs(args.data, matchbench=args.protocol == "matchbench").first(args.max_pairs)
    claim(pairs.name)
    result = evaluate_cosine(model, pairs, args.size, args.temperature, args.cache, args.protocol)
    return _with_pictures(args, pairs, result)


def _attention(args: Namespace, model: Any, claim: Claim) -> Evaluation:
    pairs = open_pairs(args.data).first(args.max_pairs)
    claim(pairs.name)
    result = evaluate_attention(model, pairs, args.size)
    return _with_pictures(args, pairs, result, lambda pair: draw_attention(model, pair, result.size))


def _with_pictures(
    args: Namespace, pairs: PairSet, result: Result, draw: Callable[[Pair], Image.Image] | None = None
) -> Evaluation:
    """Draw a few pairs, by default their warps; there are no pictures of recall, which estimates no warps."""
    few, warps = [], result.warps
    if args.pictures and warps is not None:
        draw = draw or (lambda pair: draw_warp(pair, warps[pairs.pairs.index(pair)], result.size))
        first = pairs.first(args.pictures).pairs
        few = [draw(each) for each in progress_bar(first, desc="drawing", unit="pair", leave=False)]
    return Evaluation(
        pairs.name, {"pairs": len(pairs.pairs), "set_pairs": pairs.of or len(pairs.pairs)} | result.numbers, few
    )


def _views(args: Namespace, model: Any, claim: Claim) -> Evaluation:
    settings = _settings(ViewSettings, args, ("mask_ratio", "gap", "masks", "seed"), counts=tuple(args.views))
    sequences = open_sequences(args.data, settings.least)
    claim(sequences.name)
    result = evaluate_views(model, sequences, settings, args.size, args.max_pairs)
    patches = (result.size // patch_size(model)) ** 2
    few = evenly(list(result.targets), args.pictures)
    batches = (target_batch(sequences, target, settings, result.size, patches) for target in few)
    drawn = [draw_views(model, batch, settings.mask_ratio) for batch in batches]
    return Evaluation(sequences.name, result.numbers, drawn)


def _recognition(args: Namespace, model: Any, claim: Claim) -> Evaluation:
    device = next(model.parameters()).device.type
    steps = args.steps or (CLASSIFIER_STEPS if device == "cuda" else CLASSIFIER_STEPS_CPU)
    sweep = {"learning_rates": tuple(args.learning_rates), "weight_decays": tuple(args.weight_decays)}
    seed = ClassifierSettings.seed + args.seed
    settings = _settings(ClassifierSettings, args, ("batch",), steps=steps, seed=seed, **sweep)
    images = open_images(args.data)
    if args.labels:
        relabel(images, expand_user(args.labels))
        images.name += f" ({Path(args.labels).stem})"
    claim(images.name)
    crops = (CROPS[device] if args.crops is None else args.crops) or None
    found = evaluate_recognition(
        model, images, settings, args.size or IMAGE_SIZE, crops, args.max_pairs, args.cache, args.pictures
    )
    return _of_images(images.name, found.numbers, found.pictures)


def _segmentation(args: Namespace, model: Any, claim: Claim) -> Evaluation:
    maps = open_maps(args.data)
    claim(maps.name)
    size = args.size or IMAGE_SIZE
    found = evaluate_segmentation(
        model, maps, size, args.max_pairs, args.train_images, args.cache, pictures=args.pictures
    )
    return _of_images(maps.name, found.numbers, found.pictures)


def _of_images(name: str, numbers: dict[str, Any], pictures: list[Image.Image]) -> Evaluation:
    """Say how many images were skipped, and why."""
    if skipped := numbers["skipped"]:
        print(f"{name}: {len(skipped)} images are skipped: {some_reasons(skipped, 3)}", file=sys.stderr)
    if numbers["not_scored"]:
        print(f"{name}: {numbers['not_scored']} test images are not scored", file=sys.stderr)
    return Evaluation(name, numbers, pictures)


def load_run(args: Namespace, device: torch.device) -> tuple[dict[str, Any], Any]:
    """As `load_weights`, for a run of the task that is evaluated."""
    if args.overrides:
        raise DataError("--set changes the weights of an encoder, but those of a run are fixed; --encoder names others")
    load = {"reconstruction": reconstruction, "pose": pose, "roma": roma}[args.task].load_run
    trained: Any = load(args.weights, device, args.encoder)
    about = {"weights": args.name or trained.name, "source": args.weights, "frames": trained.frames}
    return about | {"step": trained.step, "encoder": trained.encoder}, trained


def _pose(args: Namespace, trained: pose.Trained, claim: Claim) -> Evaluation:
    pairs = open_pairs(args.data, needs_depth=False)
    claim(pairs.name)
    scored = evaluate_pose(
        lambda images: pose.estimate(trained.model, images), pairs, args.size or trained.image_size, args.max_pairs,
        args.pictures,
    )  # fmt: skip
    return Evaluation(pairs.name, scored.numbers, scored.pictures)


def _reconstruction(args: Namespace, trained: reconstruction.Trained, claim: Claim) -> Evaluation:
    model, patch = trained.model, trained.model.config.patch_size

    with tempfile.TemporaryDirectory(prefix="fastmum-") as folder:
        name, protocol, manifests = open_set(args.data, Path(folder))
        claim(name)
        points = protocol.threshold is not None
        scored = evaluate_reconstruction(
            lambda batch: reconstruction.estimate(model, batch.images, points), manifests, protocol,
            args.size or protocol.size or trained.image_size, patch, not args.square, args.max_pairs, args.pictures,
        )  # fmt: skip
    return Evaluation(name, scored.numbers, scored.pictures)


def _depth(args: Namespace, encoder: Any, claim: Claim) -> Evaluation:
    on_gpu = next(encoder.parameters()).device.type == "cuda"
    steps, versions = args.steps or (DEPTH_STEPS if on_gpu else DEPTH_STEPS_CPU), args.versions
    heads = tuple(args.heads or (name for name in LINEAR if HEADS[name].cls == encoder.options.cls))
    versions = int(not on_gpu) if versions is None else versions
    more = {"steps": steps, "versions": versions, "heads": heads, **_sweep(args, DepthSettings())}
    settings = _settings(DepthSettings, args, ("batch", "loss", "seed"), **more)
    test, train = (open_depth(name, part).resized(args.size) for name, part in (
        (args.data, "test"), (args.train_data or args.data, "train"))
    )  # fmt: skip
    files = ({frame.file.resolve() for frame in each.frames if frame.file} for each in (train, test))
    if shared := set.intersection(*files):
        raise DataError(f"--train-data and --data share '{min(map(str, shared))}'; name a --train-data of other images")
    claim(test.name)
    with tempfile.TemporaryDirectory(prefix="fastmum-") as folder:
        cache = open_cache(args.cache or Path(folder), encoder) if args.cache or versions else None
        result = evaluate_depth(
            encoder, test, train, settings, args.choose_on == "train", cache, args.max_pairs, args.pictures
        )
    for data, part in ((test, "test"), (train, "training")):
        if data.skipped:
            why = f"{len(data.skipped)} {part} images are skipped: {some_reasons(data.skipped, 3)}"
            print(f"{data.name}: {why}", file=sys.stderr)
    used = of_encoder(encoder, absolute_spec(args.weights), overrides_of(args))
    about = {"task": "depth", **used, **result.best.about(), "loss": settings.loss, "size": result.longest}
    about |= {"max_depth": train.protocol.max_depth}
    return Evaluation(test.name, result.numbers, result.pictures, Probe(result.best.head.state_dict(), about))


def _roma(args: Namespace, trained: roma.Trained, claim: Claim) -> Evaluation:
    if args.size is not None and args.size % 8:
        raise FastmumError(f"--size is {args.size}, but must be a multiple of 8")
    dense = args.data.startswith(f"{DENSE}:")
    pairs = open_pairs(args.data.replace(DENSE, "megadepth", 1) if dense else args.data, matchbench=dense)
    pairs = replace(pairs, name=pairs.name + "_dense" * dense).first(args.max_pairs)
    claim(pairs.name)
    few = pairs.first(args.pictures).pairs if args.pictures else []
    scored = evaluate_roma(trained, pairs, args.size, not args.no_pose and not dense, few, args.seed)
    counts = {"pairs": len(pairs.pairs), "set_pairs": pairs.of or len(pairs.pairs)}
    return Evaluation(pairs.name, counts | scored.numbers, scored.pictures)


EVALUATIONS: dict[str, tuple[str, Callable[[Namespace, Any, Claim], Evaluation]]] = {
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
