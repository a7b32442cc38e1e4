"""Mutation test: how many small errors in the source do the fast tests find?

    python -m benchmarks.mutants --seed 0 --count 80 --out mutants.json [--tree CHECKOUT] [--jobs AREAS_AT_ONCE]

Picks seeded random mutants of five areas (swapped operators, constants + 1, negated conditions, removed statements),
applies one at a time to a copy of the checkout and runs the tests of its area there. A mutant is killed when a test
fails or takes five times the CPU time of the unchanged copy. An interrupted run continues with the same `--out`.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Area: (share of the mutants, globs of sources, globs of tests).
AREAS = {
    "kernels": (25, ["kernels/*.py"], ["tests/kernels/test_*.py", "tests/benchmarks/test_kernel_report.py"]),
    "attention": (12, ["fastmum/attention/*.py"], ["tests/attention/test_*.py"]),
    "sampling": (13, [f"fastmum/data/{n}.py" for n in ("plan", "plan_table", "packing")],
                 [f"tests/data/test_{n}.py" for n in ("plan", "packing", "loader", "rules")]),
    "checkpoint": (15, ["fastmum/engine/checkpoint/*.py"], ["tests/engine/checkpoint/test_*.py"]),
    "engine": (15, ["fastmum/engine/*.py"],
               [f"tests/{d}/test_*.py" for d in ("engine", "engine/telemetry", "distributed", "tasks")]),
}  # fmt: skip
# Tools, tables of hardware, and what only a GPU can run.
SKIPPED_FILES = re.compile(r"(__init__|report|gpus|fp8)\.py$")
SKIPPED_NAMES = re.compile(r"warps|stages|block|tile|multiprocessor|message|version|(^|_)arch|SHARED_MEMORY", re.I)
SKIPPED_CALLS = re.compile(r"^(logg\w*|log|_log|warnings|print|_?logger)\b")
CUDA = re.compile(r"cuda|gpu|nvml|nvtx", re.I)
SWAPS = [
    (ast.Add, ast.Sub), (ast.Mult, ast.FloorDiv), (ast.Div, ast.Mult), (ast.Mod, ast.FloorDiv), (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.And, ast.Or),
    (ast.BitAnd, ast.BitOr), ("min", "max"), ("minimum", "maximum"), ("any", "all"),
]  # fmt: skip
SWAP: dict[Any, Any] = {b: a for a, b in SWAPS} | dict(SWAPS)
BUDGET = 60  # CPU seconds of tests for a mutant, as measured on the unchanged copy


def is_skipped(node: ast.AST) -> bool:
    """Whether nothing in a node is mutated: messages, logging, tuning of launches, code for CUDA."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return name == "__repr__" or bool(CUDA.search(name))
        case ast.Call(func=func) | ast.Expr(value=ast.Call(func=func)):
            return bool(SKIPPED_CALLS.match(ast.unparse(func)))
        case ast.keyword(arg=str(name)):
            return bool(SKIPPED_NAMES.search(name))
        case ast.Assign() | ast.AugAssign() | ast.AnnAssign():
            return bool(SKIPPED_NAMES.search(ast.unparse(node).partition("=")[0]))
    return isinstance(node, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom | ast.Assert)


def mutations(node: Any) -> Iterator[tuple[str, Any, str]]:
    """(kind, node to replace, new text) in a tree."""
    if is_skipped(node):
        return
    skipped = {"annotation", "returns", "decorator_list", "bases"}
    match node:
        case ast.If(test=test) | ast.IfExp(test=test) if CUDA.search(ast.unparse(test)):
            skipped |= {"test", "body"}
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in SWAP:
            yield "compare", node, f"({ast.unparse(ast.Compare(left, [SWAP[type(op)]()], [right]))})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SWAP:
            yield "arithmetic", node, f"({ast.unparse(ast.BinOp(left, SWAP[type(op)](), right))})"
        case ast.BoolOp(op=op, values=values):
            yield "boolean", node, f"({ast.unparse(ast.BoolOp(SWAP[type(op)](), values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "boolean", node, f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            yield "boolean", node, str(not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", node, f"({value} + 1)"
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in SWAP:
            yield "call", node.func, re.sub(rf"\b{name}$", SWAP[name], ast.unparse(node.func))
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "condition", test, f"(not ({ast.unparse(test)}))"
        case ast.AugAssign() | ast.Continue() | ast.Break() | ast.Delete() | ast.Expr(value=ast.Call()):
            yield "statement", node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement", node, "pass"
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in skipped:
                yield from mutations(child)


def find_files(root: Path, globs: list[str]) -> list[str]:
    return sorted({str(file.relative_to(root)) for pattern in globs for file in root.glob(pattern)})


def choose(root: Path, area: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Random mutants: the kind first, then one of that kind; at most one per line. Spans are in bytes of the file."""
    draw, left, chosen = random.Random(f"{seed} {area}"), [], []
    for file in itertools.filterfalse(SKIPPED_FILES.search, find_files(root, AREAS[area][1])):
        source = (root / file).read_bytes()
        starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
        for kind, node, new in mutations(ast.parse(source)):
            span = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            place = {"area": area, "file": file, "line": node.lineno, "span": span}
            left.append(place | {"kind": kind, "old": source[slice(*span)].decode(), "new": new})
    while left and len(chosen) < count:
        kind = draw.choice(sorted({m["kind"] for m in left}))
        chosen.append(draw.choice([m for m in left if m["kind"] == kind]))
        left = [m for m in left if (m["file"], m["line"]) != (chosen[-1]["file"], chosen[-1]["line"])]
    return chosen


def run_tests(root: Path, test: str, cpu_limit: float, wall_limit: float, log: Path) -> tuple[bool, float]:
    """Runs tests in a fork, which has torch imported; returns whether they passed, and CPU seconds."""

    def run() -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_limit), int(cpu_limit) + 5))
        os.chdir(root)
        os.environ["PYTHONPATH"] = sys.path[0] = str(root)
        sys.modules.pop("benchmarks", None)
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            kernels = importlib.util.find_spec("fastmum.kernels")
            assert Path(kernels.origin).is_relative_to(root), f"{kernels} is not of the copy"
            os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", test]))

    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # user and system
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(wall_limit)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # including processes that a failed test has left
    child.join()
    return child.exitcode in (0, 5), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before


def copy_tree(tree: Path, shared: Path, root: Path) -> None:
    root.mkdir()
    copy = 'git ls-files -z | xargs -0 cp --no-dereference --parents --target-directory="$0"'
    subprocess.run(["bash", "-c", copy, root], cwd=tree, check=True)
    (root / "fastmum/kernels").symlink_to("../kernels")
    root.with_name("shared").symlink_to(shared.resolve())


def area_results(args: argparse.Namespace, area: str) -> list[dict[str, Any]]:
    """Measures the tests of an area, then tries the mutants that its file lacks; appends one JSON line each."""
    count = max(1, round(args.count * AREAS[area][0] / sum(share for share, _, _ in AREAS.values())))
    out = args.out.resolve().with_suffix(f".{area}.jsonl")
    out.touch()
    log, base = out.with_suffix(".log"), {}
    with tempfile.TemporaryDirectory(prefix=f"mutants-{area}-") as folder:
        copy_tree(args.tree, args.shared, root := Path(folder, "copy"))
        for test in find_files(root, AREAS[area][2]):
            passed, cpu = run_tests(root, test, 900, 3600, log)
            print(f"{area}: {test}, {cpu:.0f} CPU seconds" if passed else log.read_text()[-2000:], flush=True)
            base |= {test: cpu} if passed else {}
        for mutant in choose(root, area, args.seed, count)[len(out.read_text().splitlines()) :]:
            source, (start, end) = root / mutant["file"], mutant["span"]
            content, spent, mutant["killed_by"] = source.read_bytes(), 0.0, None
            source.write_bytes(content[:start] + mutant["new"].encode() + content[end:])
            nearest = {t: (f"test_{source.stem}" not in t, source.stem not in (root / t).read_text()) for t in base}
            for test in sorted(base, key=lambda t: (nearest[t], base[t])):
                if not mutant["killed_by"] and (not spent or spent + base[test] <= BUDGET):
                    spent += base[test]
                    passed, _ = run_tests(root, test, 5 * base[test] + 30, 20 * base[test] + 300, log)
                    mutant["killed_by"] = None if passed else test
            source.write_bytes(content)
            with out.open("a") as file:
                file.write(json.dumps(mutant) + "\n")
            print(*(mutant[key] for key in ("file", "line", "old", "new", "killed_by")), sep=" | ", flush=True)
    return [json.loads(line) for line in out.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--tree", type=Path, default=here, help="the checkout to test (this one)")
    parser.add_argument("--shared", type=Path, default=here.parent / "shared", help="the project's test data")
    for name, default in (("--seed", 0), ("--count", 80), ("--jobs", 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--areas", nargs="+", choices=list(AREAS), default=list(AREAS))
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    args = parser.parse_args()
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    importlib.import_module("torch._dynamo")  # the forks start with it; each imports the mutated source itself
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        results = list(itertools.chain(*pool.map(functools.partial(area_results, args), args.areas)))
    shares = {}
    for area in [*args.areas, "all"]:
        killed = [bool(m["killed_by"]) for m in results if area in ("all", m["area"])]
        shares[area] = {"mutants": len(killed), "killed": sum(killed), "share": round(sum(killed) / len(killed), 3)}
        print(f"{area}: {sum(killed)} of {len(killed)} killed")
    args.out.write_text(json.dumps({"seed": args.seed, "shares": shares, "mutants": results}, indent=1))


if __name__ == "__main__":
    main()
