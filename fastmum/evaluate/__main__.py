"""Evaluate weights: `python -m fastmum.evaluate matching|cosine|attention --weights W --data D [--out DIR]`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import fastmum
from fastmum.data.errors import DataError
from fastmum.evaluate.attention import evaluate_attention
from fastmum.evaluate.cosine import evaluate_cosine
from fastmum.evaluate.features import check_size
from fastmum.evaluate.folder import make_folder, read, save, write
from fastmum.evaluate.matcher import TEMPERATURE
from fastmum.evaluate.matching import evaluate_matching
from fastmum.evaluate.page import page
from fastmum.evaluate.pairs import SETS, PairSet, open_pairs
from fastmum.evaluate.pictures import draw_attention, draw_warp
from fastmum.evaluate.probe import ProbeSettings
from fastmum.evaluate.result import Result
from fastmum.evaluate.table import table
from fastmum.evaluate.weights import Weights, load_weights, parse_overrides, pick_device
from fastmum.pretrained.errors import WeightsError

STEPS = {"cuda": 25_000, "cpu": 200}  # supplement, section B; and what a CPU does in minutes
EVALUATIONS = 10  # of a probe's training, unless asked otherwise: every 2,500 steps of 25 K
TRAIN_PAIRS = 2000  # whose features fit in memory: 13 GB of ViT-L at 448 px in float16

PARSED = argparse.Namespace


def _parser() -> argparse.ArgumentParser:
    defaults = ProbeSettings()
    sets = "\n".join(f"  {name:11}{layout.meaning}" for name, layout in SETS.items())
    epilog = (
        "DATA is scenes or motorcycle, which need no files; a path, told apart by its content; or KIND:/path. Kinds:\n"
        f"{sets}\n\nDIR collects results: every evaluation adds a .json and pictures, and report.html and table.md\n"
        "show all that are there, with the paper's numbers beside them."
    )
    parser = argparse.ArgumentParser(
        prog="python -m fastmum.evaluate",
        description="What weights know about correspondence between views: matching by linear probe, by cosine "
        "similarity of features, and by the decoder's attention.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--weights", required=True, metavar="W",
        help="a run, a checkpoint or a file of weights; random:PRESET is an untrained model to compare with")
    add("--override", action="append", default=[], metavar="KEY=VALUE",
        help="what the weights do not tell, such as decoder_num_heads=12 (fastmum.load_pretrained); may be repeated")
    add("--name", metavar="NAME", help="of the weights in the table (default: after the run or file)")
    add("--data", default="scenes", metavar="DATA", help="pairs to evaluate on, see below (default %(default)s)")
    add("--out", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="folder (default %(default)s)")
    add("--size", type=int, metavar="PX",
        help="side that pictures are resized to (default: 256 for scenes, 512 for NAVI, else 448)")
    add("--max-pairs", type=int, metavar="N", help="evaluate on N pairs, spread over the set (default: all)")
    add("--pictures", type=int, default=4, metavar="N", help="pairs to draw (default %(default)s)")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    add("--seed", type=int, default=0, metavar="S",
        help="of random weights and of the order of training pairs (default %(default)s)")
    commands = parser.add_subparsers(dest="task", required=True, metavar="matching|cosine|attention")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[shared], help=about, description=about[0].upper() + about[1:] + ".",
                                   epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip

    matching = command("matching", "dense matching by linear probes, trained in one pass on frozen features")
    add = matching.add_argument
    add("--train-data", metavar="DATA", help="pairs to train probes on (default: other scenes of --data)")
    add("--train-pairs", type=int, default=TRAIN_PAIRS, metavar="N", help="at most (default %(default)s)")
    add("--steps", type=int, metavar="N",
        help=f"of training (default: {STEPS['cuda']:,} as in the paper, {STEPS['cpu']} without a GPU)")
    add("--every", type=int, metavar="N", help="steps between evaluations (default: a tenth of --steps)")
    add("--batch", type=int, default=defaults.batch, metavar="N", help="pairs a step (default %(default)s)")
    add("--learning-rates", type=float, nargs="+", default=defaults.learning_rates, metavar="LR",
        help="each with each weight decay makes a probe (default: %(default)s)")
    add("--weight-decays", type=float, nargs="+", default=defaults.weight_decays, metavar="WD",
        help="(default: %(default)s)")
    cosine = command("cosine", "matching by cosine similarity of features, with and without the last LayerNorm")
    for each in (matching, cosine):
        each.add_argument("--temperature", type=float, default=TEMPERATURE, metavar="T",
                          help="of the matcher (default %(default)s)")  # fmt: skip
    command("attention", "matching by the decoder's attention across views, and pictures of it")
    return parser  # fmt: skip


def _matching(args: PARSED, weights: Weights, device: torch.device) -> tuple[Result, PairSet]:
    steps = args.steps or STEPS["cuda" if device.type == "cuda" else "cpu"]
    settings = ProbeSettings(
        steps=steps,
        batch=args.batch,
        evaluate_every=args.every or max(1, steps // EVALUATIONS),
        learning_rates=tuple(args.learning_rates),
        weight_decays=tuple(args.weight_decays),
        temperature=args.temperature,
        seed=args.seed,
    )
    elsewhere = args.train_data not in (None, args.data)
    pairs = open_pairs(args.data, "all" if elsewhere else "test").first(args.max_pairs)
    train = open_pairs(args.train_data if elsewhere else args.data, "all" if elsewhere else "train")
    return evaluate_matching(weights.model, pairs, train.first(args.train_pairs), settings, args.size), pairs


def _cosine(args: PARSED, weights: Weights, device: torch.device) -> tuple[Result, PairSet]:
    pairs = open_pairs(args.data).first(args.max_pairs)
    return evaluate_cosine(weights.model, pairs, args.size, args.temperature), pairs


def _attention(args: PARSED, weights: Weights, device: torch.device) -> tuple[Result, PairSet]:
    pairs = open_pairs(args.data).first(args.max_pairs)
    return evaluate_attention(weights.model, pairs, args.size), pairs


RUN: dict[str, Callable[[PARSED, Weights, torch.device], tuple[Result, PairSet]]] = {
    "matching": _matching,
    "cosine": _cosine,
    "attention": _attention,
}


def _draw(args: PARSED, weights: Weights, result: Result, pairs: PairSet) -> list[Image.Image]:
    """Pictures of a few pairs: Fig. 6 of attention, Fig. 7 of the others."""
    shown = pairs.first(args.pictures) if args.pictures else None
    if shown is None or result.warps is None:
        return []
    bar = tqdm(shown.pairs, desc="drawing", unit="pair", leave=False)
    if args.task == "attention":
        return [draw_attention(weights.model, pair, result.size) for pair in bar]
    numbers = {pair.name: i for i, pair in enumerate(pairs.pairs)}
    return [draw_warp(pair, result.warps[numbers[pair.name]], result.size) for pair in bar]


def _run(args: PARSED) -> None:
    for name, least in (("max_pairs", 1), ("train_pairs", 1), ("steps", 1), ("every", 1), ("pictures", 0), ("seed", 0)):
        if (value := getattr(args, name, None)) is not None and value < least:
            raise DataError(f"--{name.replace('_', '-')} is {value}, but must be at least {least}")
    out = args.out.expanduser()
    make_folder(out)
    device = pick_device(args.device)
    weights = load_weights(args.weights, args.name, device, parse_overrides(args.override), args.seed)
    if args.size is not None:
        check_size(weights.model, args.size)
    result, pairs = RUN[args.task](args, weights, device)
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
    saved = save(out, about | result.numbers, _draw(args, weights, result, pairs))
    records = read(out)
    text = table(records).markdown()
    write(out / "table.md", text)
    write(out / "report.html", page(records))
    print(f"{text}\n{saved.file}\n{out / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    try:
        _run(args)
    except (DataError, WeightsError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
