"""All evaluations of several encoders, and one table of them: `fastmum evaluate all --weights A B C`."""

import argparse
import itertools
import logging
import shlex
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastmum.data.errors import DataError
from fastmum.errors import FastmumError, first_line
from fastmum.evaluate.records import MATCHERS
from fastmum.evaluate.results import (
    HEADLINES,
    NONE,
    PUBLISHED_SCORES,
    SCORES,
    VIEWS,
    ResultGroup,
    ResultTable,
    check_same,
    digits,
    group,
    mean_sd,
    models,
    score_title,
)
from fastmum.pretrained.load import PATHLESS, RANDOM, absolute_spec, spec_name, split_spec

log = logging.getLogger(__name__)

DEFAULT = "default"  # --data: what each evaluation takes by itself
SEEDED = ("matching", "views", "recognition", "depth", "roma")  # evaluations that depend on the seed with given weights


def overview(contents: Iterable[dict[str, Any]]) -> tuple[ResultTable, list[str]]:
    """A row for each encoder, with mean and standard deviation over its seeds, and a column for each score and set.

    The rows of the paper follow, where results of the same protocol on the same pairs are there. Seeds are as
    `models` says. The second value are remarks on results of different settings.
    """
    groups = [each for each in group(contents) if each.contents]
    columns = [(each, score) for each in groups for score in headlines(each)]
    named = models(content for each in groups for content in each.contents)
    rows = []
    for model in dict.fromkeys(named.values()):
        same = [name for name, own in named.items() if own == model]
        rows.append([model, str(len(same)), *(_cell(each, score, same) for each, score in columns)])
    for method in dict.fromkeys(method for each, _ in columns for method in each.paper):
        rows.append([f"{method} (paper)", "", *(_published(each, score, method) for each, score in columns)])
    notes = []
    for each in groups:
        try:
            check_same(each.contents)
        except DataError as error:
            notes.append(f"{MATCHERS[each.task]}: {error}")
    return ResultTable(["encoder", "seeds", *(_title(each, score) for each, score in columns)], rows), notes


def headlines(of: ResultGroup) -> list[str]:
    """The scores of an evaluation in the overview."""
    there = {name for content in of.contents for name, value in content["scores"].items() if value is not None}
    named = [name for name in HEADLINES.get(of.task, ()) if name in there]
    first = [name for name in SCORES if name in there] + sorted(name for name in there if name.startswith(VIEWS))
    return named or first[:1]


def _title(of: ResultGroup, score: str) -> str:
    label, count, size = of.about()
    protocol = "" if of.on.protocol in (None, "patches") else f" by {of.on.protocol}"
    return f"{MATCHERS[of.task]}{protocol}, {label} ({count}, {size} px): {score_title(score)}"


def _cell(of: ResultGroup, score: str, weights: Sequence[str]) -> str:
    values = [content["scores"].get(score) for content in of.contents if content["weights"] in weights]
    return mean_sd(values, f".{digits(score)}f", among=len(weights))


def _published(of: ResultGroup, score: str, method: str) -> str:
    names = PUBLISHED_SCORES.get(of.task) or PUBLISHED_SCORES.get(of.on.set, ("epe",))
    values = of.paper.get(method, ())
    found = dict(zip(names, values if isinstance(values, tuple) else (values,), strict=False)).get(score)
    return NONE if found is None else f"{found:.{digits(score)}f}"


def run_all(
    parser: argparse.ArgumentParser, tasks: Sequence[str], args: Namespace, evaluate: Callable[[Namespace], None]
) -> list[str]:
    """Run evaluations of all weights on all data by their own defaults; returns remarks on those that were not run.

    These are the ones that fail; faults other than a FastmumError are logged with their traceback. Those that are not
    `SEEDED` run with the first seed only, unless the weights are random. FastmumError: all fail.
    """
    failed, words = dict[tuple[str, str, str], list[str]](), dict[str, list[str]]()
    for each in args.options:
        task, _, more = each.partition("=")
        if task not in tasks:
            raise FastmumError(f"--options {each}: must be EVALUATION=OPTIONS with one of {', '.join(tasks)}")
        try:
            words.setdefault(task, []).extend(shlex.split(more))
        except ValueError as error:
            raise FastmumError(f"--options {each}: {error}") from None
    runs = [
        (task, weights, data, [task, "--weights", weights, *_shared(args, data), *words.get(task, [])])
        for task in args.tasks for data in args.data for weights in args.weights
    ]  # fmt: skip
    names = distinct_names(args.weights)
    counts = [args.seeds if task in SEEDED or spec.startswith(f"{RANDOM}:") else 1 for task, spec, *_ in runs]
    # Errors of the arguments come before the first evaluation.
    parsed = [[parser.parse_args(run[-1]) for _ in range(n)] for run, n in zip(runs, counts, strict=True)]
    done = 0
    for (task, weights, data, _), seeds in zip(runs, parsed, strict=True):
        for number, own in enumerate(seeds):
            own.seed, own.number = own.seed + number, number if args.seeds > 1 else None
            own.name = own.name or names.get(weights)
            print(f"{task}: {weights}, {data}, seed {own.seed}", file=sys.stderr)
            try:
                evaluate(own)
                done += 1
            except Exception as error:  # a fault of one evaluation leaves the others
                known = isinstance(error, FastmumError)
                why = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
                log.warning("  not run: %s", why, exc_info=not known)
                failed.setdefault((weights, data, why), []).append(task)
                break
    if not done:
        (weights, _, why), named = next(iter(failed.items()))
        raise FastmumError(f"no evaluation could be run; the first, {named[0]} of '{weights}': {why}")
    return [
        f"Not run: {', '.join(named)} of {weights}{'' if data == DEFAULT else f' on {data}'}: {why}"
        for (weights, data, why), named in failed.items()
    ]


def distinct_names(specs: Iterable[str]) -> dict[str, str]:
    """Names of weights that would have the same one: those of the files with endings, or folders above that differ."""
    alike = defaultdict[str, dict[str, Path]](dict)
    for spec in specs:
        kind, where = split_spec(spec)
        if kind not in PATHLESS:
            alike[spec_name(spec)][spec] = Path(absolute_spec(where))
    names = dict[str, str]()
    for name, paths in alike.items():
        if len(paths) > 1:
            folders = {spec: path.parent.parts[1:] for spec, path in paths.items()}
            longer = ({spec: "/".join((*above[-n:], name)) for spec, above in folders.items()}
                      for n in range(1, 1 + max(map(len, folders.values()))))  # fmt: skip
            found = itertools.chain([{spec: path.name for spec, path in paths.items()}], longer)
            names |= next((each for each in found if len({*each.values()}) == len(paths)), {})
    return names


def _shared(args: Namespace, data: str) -> Iterator[str]:
    yield from ("--out", str(args.out), "--device", args.device, "--seed", str(args.seed))
    yield from () if data == DEFAULT else ("--data", data)
    for name in ("size", "max_pairs", "pictures"):
        if getattr(args, name) is not None:
            yield from (f"--{name.replace('_', '-')}", str(getattr(args, name)))


def add_arguments(parser: argparse.ArgumentParser, tasks: Sequence[str]) -> None:
    """The options of `all`."""
    add = parser.add_argument
    data = "sets, as --data of the evaluations, each of which takes those it knows (default: its own)"
    options = "options of an evaluation, such as 'matching=--steps 4000'"
    seeds = (
        "seeds of random weights, probes and masks, from --seed on; weights of names like 'a-0', 'a-1' are seeds, too"
    )
    add("--weights", required=True, nargs="+", metavar="W", help="weights to compare, see below")
    add("--data", nargs="+", default=[DEFAULT], metavar="DATA", help=data)
    add("--tasks", nargs="+", choices=tasks, default=list(tasks), metavar="T", help="evaluations (default: all)")
    add("--options", nargs="+", default=[], metavar="T=O", help=options)
    add("--seeds", type=int, default=1, metavar="N", help=f"{seeds} (%(default)s)")
