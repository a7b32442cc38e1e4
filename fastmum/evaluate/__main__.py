"""Evaluate weights: `python -m fastmum.evaluate EVALUATION --weights W --data D [--out DIR]`."""

import argparse
import contextlib
import logging
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fastmum
from fastmum.data.errors import DataError, reading
from fastmum.engine.device import pick_device
from fastmum.errors import FastmumError, run_command, writing
from fastmum.evaluate.arguments import ALL, check, make_parser
from fastmum.evaluate.commands import EVALUATIONS, load_run, load_weights, overrides_of
from fastmum.evaluate.features import check_size
from fastmum.evaluate.overview import overview, run_all
from fastmum.evaluate.records import MATCHING, Record, check_free, make_folder, printable, read, save
from fastmum.evaluate.result_page import page
from fastmum.evaluate.results import NOTE, OF_RUNS, table
from fastmum.features.probe import write_probe
from fastmum.files import expand_user, write_atomic

OVERVIEW = "overview.md"
REMEDIES = {"matching": "lower --batch, --size or the number of --learning-rates", "views": "lower --size or --views",
            "depth": "lower --batch", "recognition": "lower --batch or --size"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser({task: text for task, (text, _) in EVALUATIONS.items()})
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
    check(args)

    def evaluate(own: Namespace) -> None:
        with _remedies(own.task):
            _evaluate(own)

    not_run = run_all(parser, list(EVALUATIONS), args, evaluate)
    out = expand_user(args.out)
    _write_tables(out, not_run)
    print("\n".join([(out / OVERVIEW).read_text(encoding="utf-8"), str(out / OVERVIEW), str(out / "report.html")]))


def _write_tables(out: Path, not_run: Sequence[str] | None = None) -> str:
    """Write table.md and report.html of all results in a folder; returns the table.

    With remarks on what was `not_run`, or if the folder has an overview, whose remarks stay, also that.
    """
    records, file, found = read(out), out / OVERVIEW, None
    text, notes = table(records).markdown(), [*(not_run or ())]
    if not_run is None and file.exists():
        with reading(file, "text"):
            notes = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("- Not run")]
    with writing(out, DataError):
        write_atomic(out / "table.md", f"{text}\n{NOTE}\n")
        if not_run is not None or file.exists():
            found, differences = overview(record.content for record in records)
            notes = differences + notes
            write_atomic(file, "\n".join([found.markdown(), *(f"- {note}" for note in notes), ""]))
        write_atomic(out / "report.html", page(records, found, notes))
    return text


def _evaluate(args: Namespace) -> Record:
    """Run an evaluation and save its results."""
    check(args)
    out = expand_user(args.out)
    make_folder(out)
    read(out)  # the page needs every result; fail before the evaluation
    overrides = overrides_of(args)
    device = pick_device(args.device, key="--device")
    weights: dict[str, Any]
    model: Any
    if args.task in OF_RUNS:
        weights, model = load_run(args, device)
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


if __name__ == "__main__":
    sys.exit(main())
