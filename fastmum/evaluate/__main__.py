"""Evaluate weights: `python -m fastmum.evaluate matching|cosine|attention|views --weights W --data D [--out DIR]`."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import fastmum
from fastmum.data.errors import DataError
from fastmum.errors import FastmumError, run_command
from fastmum.evaluate.arguments import check, make_parser, probe_settings, view_settings
from fastmum.evaluate.attention import evaluate_attention
from fastmum.evaluate.features import check_size, patch_size
from fastmum.evaluate.folder import check_free, make_folder, read, save
from fastmum.evaluate.matching import Result, evaluate_cosine, evaluate_matching
from fastmum.evaluate.page import page
from fastmum.evaluate.pairs import Pair, PairSet, open_pairs, overlap, same_set
from fastmum.evaluate.pairs.pair import evenly
from fastmum.evaluate.pictures import draw_attention, draw_views, draw_warp
from fastmum.evaluate.sequences import open_sequences
from fastmum.evaluate.table import table
from fastmum.evaluate.views import evaluate_views, target_batch
from fastmum.evaluate.weights import load_weights
from fastmum.files import write_atomic
from fastmum.pretrained.arguments import parse_overrides
from fastmum.pretrained.device import pick_device

REMEDIES = {
    "matching": "lower --batch or --size, or the number of --learning-rates",
    "cosine": "lower --size",
    "attention": "lower --size",
    "views": "lower --size or --views",
}

Claim = Callable[[str], None]  # checks, by the name of the set, that a result would not replace another one
Evaluated = tuple[str, dict[str, Any], list[Image.Image]]  # name of the set, numbers, pictures


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
            remedy = f"{REMEDIES[args.task]}, or use --device cpu"
            raise FastmumError(f"the memory of the device is too small: {remedy}") from None
        except FloatingPointError as error:
            raise FastmumError(str(error)) from None

    return run_command(run)


def _run(args: Namespace) -> None:
    check(args)
    out = args.out.expanduser()
    make_folder(out)
    read(out)  # the page needs every result; fail before the evaluation
    overrides = parse_overrides(args.overrides, {"device": "--device"})
    weights = load_weights(args.weights, args.name, pick_device(args.device), overrides, args.seed)
    if args.size is not None:
        check_size(weights.model, args.size)
    about = {"task": args.task, "set": "", "weights": weights.name, "source": args.weights, "data": args.data}
    set_name, numbers, pictures = EVALUATIONS[args.task](
        args, weights.model, lambda name: check_free(out, about | {"set": name})
    )
    about |= {"set": set_name, "fastmum": fastmum.__version__, "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    saved = save(out, about | numbers, pictures)
    records = read(out)
    text = table(records).markdown()
    write_atomic(out / "table.md", text)
    write_atomic(out / "report.html", page(records))
    print(f"{text}\n{saved.file}\n{out / 'report.html'}")


def _matching(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    settings = probe_settings(args, next(model.parameters()).device.type)
    separate = args.train_data is not None and not same_set(args.train_data, args.data)
    pairs = open_pairs(args.data, "all" if separate else "test")
    train = open_pairs(args.train_data, "trainable") if separate else open_pairs(args.data, "train")
    if separate and (shared := overlap(train, pairs)):
        raise DataError(
            f"--train-data '{args.train_data}' and --data '{args.data}' share {shared}; name a --train-data that is "
            "not tested on"
        )
    claim(pairs.name)
    pairs = pairs.first(args.max_pairs)
    result = evaluate_matching(model, pairs, train.first(args.train_pairs), settings, args.size)
    return _with_pictures(args, pairs, result)


def _cosine(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    pairs = open_pairs(args.data).first(args.max_pairs)
    claim(pairs.name)
    return _with_pictures(args, pairs, evaluate_cosine(model, pairs, args.size, args.temperature))


def _attention(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    pairs = open_pairs(args.data).first(args.max_pairs)
    claim(pairs.name)
    result = evaluate_attention(model, pairs, args.size)
    return _with_pictures(args, pairs, result, lambda pair: draw_attention(model, pair, result.size))


def _with_pictures(
    args: Namespace, pairs: PairSet, result: Result, draw: Callable[[Pair], Image.Image] | None = None
) -> Evaluated:
    """Draw a few pairs, by default their warps; there are no pictures of recall, which estimates no warps."""

    def draw_pair_warp(pair: Pair) -> Image.Image:
        assert result.warps is not None
        return draw_warp(pair, result.warps[pairs.pairs.index(pair)], result.size)

    few = pairs.first(args.pictures).pairs if args.pictures and result.warps is not None else []
    pictures = [(draw or draw_pair_warp)(pair) for pair in tqdm(few, desc="drawing", unit="pair", leave=False)]
    return pairs.name, {"pairs": len(pairs.pairs)} | result.numbers, pictures


def _views(args: Namespace, model: Any, claim: Claim) -> Evaluated:
    settings = view_settings(args)
    sequences = open_sequences(args.data, settings.least)
    claim(sequences.name)
    result = evaluate_views(model, sequences, settings, args.size, args.max_pairs)
    patches = (result.size // patch_size(model)) ** 2
    few = evenly(result.targets, args.pictures)
    batches = (target_batch(sequences, target, settings, result.size, patches) for target in few)
    return sequences.name, result.numbers, [draw_views(model, batch, settings.mask_ratio) for batch in batches]


EVALUATIONS: dict[str, Callable[[Namespace, Any, Claim], Evaluated]] = {
    "matching": _matching,
    "cosine": _cosine,
    "attention": _attention,
    "views": _views,
}


if __name__ == "__main__":
    sys.exit(main())
