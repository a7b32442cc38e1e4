"""Evaluate weights: `python -m fastmum.evaluate matching|cosine|attention|views --weights W --data D [--out DIR]`."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

import fastmum
from fastmum.data.errors import DataError
from fastmum.engine.device import pick_device
from fastmum.errors import FastmumError
from fastmum.evaluate.arguments import check, make_parser, probe_settings, view_settings
from fastmum.evaluate.attention import evaluate_attention
from fastmum.evaluate.cosine import evaluate_cosine
from fastmum.evaluate.features import check_size, patch_size
from fastmum.evaluate.folder import check_free, make_folder, read, save, write
from fastmum.evaluate.matching import evaluate_matching
from fastmum.evaluate.page import page
from fastmum.evaluate.pairs import Pair, PairSet, open_pairs, overlap, same_set
from fastmum.evaluate.pairs.pair import evenly
from fastmum.evaluate.pictures import draw_attention, draw_views, draw_warp
from fastmum.evaluate.result import Result
from fastmum.evaluate.sequences import SequenceSet, open_sequences
from fastmum.evaluate.table import table
from fastmum.evaluate.views import evaluate_views, shown, some_targets
from fastmum.evaluate.weights import Weights, load_weights
from fastmum.pretrained.arguments import parse_overrides

REMEDIES = {
    "matching": "lower --batch or --size, or the number of --learning-rates",
    "cosine": "lower --size",
    "attention": "lower --size",
    "views": "lower --size or --views",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    try:
        _run(args)
    except (DataError, FastmumError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(
            f"error: the memory of the device is too small: {REMEDIES[args.task]}, or take --device cpu",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _run(args: Namespace) -> None:
    check(args)
    out = args.out.expanduser()
    make_folder(out)
    read(out)  # what is there must be readable when the page is made
    overrides = parse_overrides(args.overrides, {"device": "--device"})
    weights = load_weights(args.weights, args.name, pick_device(args.device, key="--device"), overrides, args.seed)
    if args.size is not None:
        check_size(weights.model, args.size)
    found = EVALUATIONS[args.task](args, weights)
    about = {
        "task": args.task,
        "set": found.set,
        "weights": weights.name,
        "source": args.weights,
        "data": args.data,
        "fastmum": fastmum.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }
    saved = save(out, about | found.numbers, found.draw())
    records = read(out)
    text = table(records).markdown()
    write(out / "table.md", text)
    write(out / "report.html", page(records))
    print(f"{text}\n{saved.file}\n{out / 'report.html'}")


class Found(NamedTuple):
    """What an evaluation gives to the folder of results.

    Args:
        set: name of what it was measured on.
        numbers: for JSON.
        draw: makes its pictures.
    """

    set: str
    numbers: dict[str, Any]
    draw: Callable[[], list[Image.Image]]


def _matching(args: Namespace, weights: Weights) -> Found:
    settings = probe_settings(args, next(weights.model.parameters()).device.type)
    elsewhere = args.train_data is not None and not same_set(args.train_data, args.data)
    pairs = open_pairs(args.data, "all" if elsewhere else "test")
    train = open_pairs(args.train_data, "trainable") if elsewhere else open_pairs(args.data, "train")
    if elsewhere and (shared := overlap(train, pairs)):
        raise DataError(
            f"--train-data '{args.train_data}' and --data '{args.data}' share {shared}; what is tested on may not be "
            "trained on: name another set by --train-data"
        )
    _claim(args, pairs, weights)
    pairs = pairs.first(args.max_pairs)
    result = evaluate_matching(weights.model, pairs, train.first(args.train_pairs), settings, args.size)
    return _of_pairs(args, pairs, result, partial(_warp, result, pairs))


def _cosine(args: Namespace, weights: Weights) -> Found:
    pairs = open_pairs(args.data).first(args.max_pairs)
    _claim(args, pairs, weights)
    result = evaluate_cosine(weights.model, pairs, args.size, args.temperature)
    return _of_pairs(args, pairs, result, partial(_warp, result, pairs))


def _attention(args: Namespace, weights: Weights) -> Found:
    pairs = open_pairs(args.data).first(args.max_pairs)
    _claim(args, pairs, weights)
    result = evaluate_attention(weights.model, pairs, args.size)
    return _of_pairs(args, pairs, result, lambda pair: draw_attention(weights.model, pair, result.size))


def _views(args: Namespace, weights: Weights) -> Found:
    settings, model = view_settings(args), weights.model
    sequences = open_sequences(args.data, settings.least)
    _claim(args, sequences, weights)
    result = evaluate_views(model, sequences, settings, args.size, args.max_pairs)

    def draw() -> list[Image.Image]:
        patches = (result.size // patch_size(model)) ** 2
        few = evenly(some_targets(sequences, settings, args.max_pairs), args.pictures)
        batches = (shown(sequences, each, settings, result.size, patches) for each in few)
        return [draw_views(model, batch, settings.mask_ratio) for batch in batches]

    return Found(sequences.name, result.numbers, draw)


EVALUATIONS: dict[str, Callable[[Namespace, Weights], Found]] = {
    "matching": _matching,
    "cosine": _cosine,
    "attention": _attention,
    "views": _views,
}


def _claim(args: Namespace, data: PairSet | SequenceSet, weights: Weights) -> None:
    """Look whether results have a file of their own, before anything is computed."""
    check_free(args.out.expanduser(), args.task, data.name, weights.name)


def _of_pairs(args: Namespace, pairs: PairSet, result: Result, draw: Callable[[Pair], Image.Image]) -> Found:
    """Pictures of a few pairs: Fig. 6 of attention, Fig. 7 of the others; of recall none, which estimates no warps."""
    few = pairs.first(args.pictures).pairs if args.pictures and result.warps is not None else []

    def pictures() -> list[Image.Image]:
        return [draw(pair) for pair in tqdm(few, desc="drawing", unit="pair", leave=False)]

    return Found(pairs.name, {"pairs": len(pairs.pairs)} | result.numbers, pictures)


def _warp(result: Result, pairs: PairSet, pair: Pair) -> Image.Image:
    return draw_warp(pair, result.warps[pairs.pairs.index(pair)], result.size)


if __name__ == "__main__":
    sys.exit(main())
