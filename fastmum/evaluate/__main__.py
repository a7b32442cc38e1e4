"""Evaluate weights: `python -m fastmum.evaluate matching|cosine|attention --weights W --data D [--out DIR]`."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import torch
from PIL import Image
from tqdm import tqdm

import fastmum
from fastmum.data.errors import DataError
from fastmum.evaluate.arguments import check, make_parser, probe_settings
from fastmum.evaluate.attention import evaluate_attention
from fastmum.evaluate.cosine import evaluate_cosine
from fastmum.evaluate.features import check_size
from fastmum.evaluate.folder import make_folder, read, save, write
from fastmum.evaluate.matching import evaluate_matching
from fastmum.evaluate.page import page
from fastmum.evaluate.pairs import PairSet, open_pairs
from fastmum.evaluate.pictures import draw_attention, draw_warp
from fastmum.evaluate.result import Result
from fastmum.evaluate.table import table
from fastmum.evaluate.weights import load_weights, parse_overrides, pick_device
from fastmum.model.encoder import Encoder
from fastmum.pretrained.errors import WeightsError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    try:
        _run(args)
    except (DataError, WeightsError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
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
    weights = load_weights(args.weights, args.name, pick_device(args.device), parse_overrides(args.override), args.seed)
    if args.size is not None:
        check_size(weights.model, args.size)
    result, pairs = EVALUATIONS[args.task](args, weights.model)
    about = {
        "task": args.task,
        "set": pairs.name,
        "weights": weights.name,
        "source": args.weights,
        "data": args.data,
        "pairs": len(pairs.pairs),
        "fastmum": fastmum.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }
    saved = save(out, about | result.numbers, _draw(args, weights.model, result, pairs))
    records = read(out)
    text = table(records).markdown()
    write(out / "table.md", text)
    write(out / "report.html", page(records))
    print(f"{text}\n{saved.file}\n{out / 'report.html'}")


def _matching(args: Namespace, model: Encoder) -> tuple[Result, PairSet]:
    settings = probe_settings(args, next(model.parameters()).device.type)
    elsewhere = args.train_data not in (None, args.data)
    pairs = open_pairs(args.data, "all" if elsewhere else "test").first(args.max_pairs)
    train = open_pairs(args.train_data, "all") if elsewhere else open_pairs(args.data, "train")
    return evaluate_matching(model, pairs, train.first(args.train_pairs), settings, args.size), pairs


def _cosine(args: Namespace, model: Encoder) -> tuple[Result, PairSet]:
    pairs = open_pairs(args.data).first(args.max_pairs)
    return evaluate_cosine(model, pairs, args.size, args.temperature), pairs


def _attention(args: Namespace, model: Encoder) -> tuple[Result, PairSet]:
    pairs = open_pairs(args.data).first(args.max_pairs)
    return evaluate_attention(model, pairs, args.size), pairs


EVALUATIONS: dict[str, Callable[[Namespace, Encoder], tuple[Result, PairSet]]] = {
    "matching": _matching,
    "cosine": _cosine,
    "attention": _attention,
}


def _draw(args: Namespace, model: Encoder, result: Result, pairs: PairSet) -> list[Image.Image]:
    """Pictures of a few pairs: Fig. 6 of attention, Fig. 7 of the others."""
    if not args.pictures or result.warps is None:
        return []
    bar = tqdm(pairs.first(args.pictures).pairs, desc="drawing", unit="pair", leave=False)
    if args.task == "attention":
        return [draw_attention(model, pair, result.size) for pair in bar]
    numbers = {pair.name: i for i, pair in enumerate(pairs.pairs)}
    return [draw_warp(pair, result.warps[numbers[pair.name]], result.size) for pair in bar]


if __name__ == "__main__":
    sys.exit(main())
