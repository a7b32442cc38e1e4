"""Mutation test: how many small errors in the source do the fast tests find?

    python tests/mutants.py --seed 0 --count 80 --out mutants.json [--tree CHECKOUT] [--jobs AREAS_AT_ONCE]

Picks seeded random mutants of five areas (swapped operators, constants + 1, negated conditions, removed statements),
applies one at a time to a copy of the checkout and runs the tests of its area there. A mutant is killed when a test
fails or takes five times the CPU time of the unchanged copy. An interrupted run continues with the same `--out`.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Area: (share of the mutants, globs of sources, globs of tests). Absent files are ignored: the globs name the folders
# of before and after `fastmum/training` and `fastmum/parallel` became `fastmum/engine`.
PLAN = ["plan", "plan_table", "packing", "balance", "mixture", "crops", "split", "sampler", "sampling", "lengths"]
ENGINE, ENGINE_TESTS = ("training", "parallel", "engine", "*/telemetry"), ("distributed", "tasks")
AREAS = {
    "kernels": (25, ["kernels/*.py"], ["tests/kernels/test_*.py", "tests/benchmarks/test_kernel_report.py"]),
    "attention": (12, ["fastmum/attention/*.py"], ["tests/attention/test_*.py"]),
    "sampling": (13, [f"fastmum/data/{n}.py" for n in PLAN],
                 [f"tests/data/test_{n}.py" for n in [*PLAN, "loader", "splits", "sources"]]),
    "checkpoint": (15, [f"fastmum/{d}/checkpoint/*.py" for d in ("training", "engine")],
                   [f"tests/{d}/checkpoint/test_*.py" for d in ("training", "engine")]),
    "engine": (15, [f"fastmum/{d}/*.py" for d in ENGINE], [f"tests/{d}/test_*.py" for d in (*ENGINE, *ENGINE_TESTS)]),
}  # fmt: skip
# Tools, tables of hardware, the tests' own truth, and what only a GPU can run.
SKIPPED_FILES = re.compile(r"(__init__|report\w*|compiled|reference|gpus|paper|fp8|weights_and_biases|wandb_sink)\.py$")
SKIPPED_NAMES = re.compile(r"warps|stages|block|tile|multiprocessor|message|version|(^|_)arch|SHARED_MEMORY", re.I)
SKIPPED_CALLS = re.compile(r"^(logg\w*|log|_log|warnings|print|_?logger)\b")
CUDA = re.compile(r"cuda|gpu|nvml|nvtx", re.I)
SWAPS: dict[type, Any] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
CALL_SWAPS = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"}
BUDGET = 60  # CPU seconds of tests for a mutant, as measured on the unchanged copy


class Mutant(NamedTuple):
    area: str
    file: str
    line: int
    kind: str
    span: tuple[int, int]  # bytes of the file
    old: str
    new: str


def is_skipped(node: ast.AST) -> bool:
    """Whether nothing in a node is mutated: messages, logging, tuning of launches, code for CUDA."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return name == "__repr__" or bool(CUDA.search(name))
        case ast.JoinedStr() | ast.Raise() | ast.Import() | ast.ImportFrom() | ast.Assert():
            return True
        case ast.Call(func=func):
            return bool(SKIPPED_CALLS.match(ast.unparse(func)))
        case ast.keyword(arg=str(name)):
            return bool(SKIPPED_NAMES.search(name))
        case ast.Assign(targets=[*targets]) | ast.AugAssign(target=targets) | ast.AnnAssign(target=targets):
            targets = targets if isinstance(targets, list) else [targets]
            return any(SKIPPED_NAMES.search(ast.unparse(target)) for target in targets)
    return False


def mutations(node: Any) -> Iterator[tuple[str, Any, str]]:
    """(kind, node to replace, new text) in a tree."""
    if is_skipped(node):
        return
    if isinstance(node, ast.If | ast.IfExp) and CUDA.search(ast.unparse(node.test)):
        for child in node.orelse if isinstance(node, ast.If) else [node.orelse]:
            yield from mutations(child)
        return
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in SWAPS:
            yield "compare", node, f"({ast.unparse(ast.Compare(left, [SWAPS[type(op)]()], [right]))})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SWAPS:
            yield "arithmetic", node, f"({ast.unparse(ast.BinOp(left, SWAPS[type(op)](), right))})"
        case ast.BoolOp(op=op, values=values):
            yield "boolean", node, f"({ast.unparse(ast.BoolOp(SWAPS[type(op)](), values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "boolean", node, f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            yield "boolean", node, str(not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", node, f"({value} + 1)"
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in CALL_SWAPS:
            yield "call", node.func, re.sub(rf"\b{name}$", CALL_SWAPS[name], ast.unparse(node.func))
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "condition", test, f"(not ({ast.unparse(test)}))"
        case ast.Expr(value=ast.Call() as call) if not is_skipped(call):
            yield "statement", node, "pass"
        case ast.AugAssign() | ast.Continue() | ast.Break() | ast.Delete():
            yield "statement", node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement", node, "pass"
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list", "bases"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from mutations(child)


def mutants_of(root: Path, area: str) -> Iterator[Mutant]:
    for file in sorted({f for pattern in AREAS[area][1] for f in root.glob(pattern)}):
        if SKIPPED_FILES.search(file.name):
            continue
        source = file.read_bytes()
        starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
        for kind, node, new in mutations(ast.parse(source)):
            span = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            old = source[slice(*span)].decode()
            yield Mutant(area, str(file.relative_to(root)), node.lineno, kind, span, old, new)


def choose(root: Path, area: str, seed: int, count: int) -> list[Mutant]:
    """Random mutants: the kind first, then one of that kind; at most one per line."""
    draw = random.Random(f"{seed} {area}")
    left = list(mutants_of(root, area))
    chosen: list[Mutant] = []
    while left and len(chosen) < count:
        kind = draw.choice(sorted({m.kind for m in left}))
        chosen.append(draw.choice([m for m in left if m.kind == kind]))
        left = [m for m in left if (m.file, m.line) != (chosen[-1].file, chosen[-1].line)]
    return chosen


def copy_tree(tree: Path, shared: Path, scratch: Path) -> Path:
    """A copy whose own interpreter imports `fastmum` and `fastmum.kernels` from the copy."""
    root = scratch / "copy"
    names = subprocess.run(["git", "ls-files"], cwd=tree, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / name, root / name, follow_symlinks=False)
    if shared.is_dir():
        (scratch / "shared").symlink_to(shared)
    (root / "fastmum/kernels").symlink_to("../kernels")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / ".venv"], check=True)
    (site,) = (root / ".venv").glob("lib/python*/site-packages")
    paths = [str(root), *(p for p in sys.path if p.endswith("site-packages"))]
    (site / "copy.pth").write_text("\n".join(paths))
    return root


def run_tests(test: str, cpu_limit: float, wall_limit: float, log: Path) -> tuple[str, float]:
    """Runs tests in a fork, which has torch imported; returns "passed", "failed" or "timeout", and CPU seconds."""
    end, child = time.monotonic() + wall_limit, os.fork()
    if not child:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_limit), int(cpu_limit) + 5))
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        import pytest

        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", test]))
    while not (done := os.wait4(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # including processes that a failed test has left
    _, status, usage = done if done[0] else os.wait4(child, 0)
    code, cpu = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    return ("passed" if code in (0, 5) else "timeout" if code in (-signal.SIGXCPU, -signal.SIGKILL) else "failed"), cpu


def work(root: Path, area: str, seed: int, count: int, out: Path) -> None:
    """Measures the tests of an area, then tries the mutants that are not in `out` yet; appends one JSON line each."""
    spec = importlib.util.find_spec("fastmum.kernels")
    assert Path(str(spec and spec.origin)).is_relative_to(root), f"{spec} is not in {root}"
    importlib.import_module("torch._dynamo")  # the forks start with it; each imports the mutated source itself
    os.chdir(root)
    log, base = out.with_suffix(".log"), dict[str, float]()
    for test in sorted({str(f.relative_to(root)) for pattern in AREAS[area][2] for f in root.glob(pattern)}):
        result, cpu = run_tests(test, 900, 3600, log)
        print(f"{area}: {test} {result}, {cpu:.0f} CPU seconds", flush=True)
        if result == "passed":
            base[test] = cpu
        else:
            print(log.read_text()[-2000:], flush=True)
    out.touch()
    for mutant in choose(root, area, seed, count)[len(out.read_text().splitlines()) :]:
        stem, source = Path(mutant.file).stem, root / mutant.file
        uses = {test: bool(re.search(rf"\b{stem}\b", (root / test).read_text())) for test in base}
        content, result, spent, killer = source.read_bytes(), "passed", 0.0, ""
        source.write_bytes(content[: mutant.span[0]] + mutant.new.encode() + content[mutant.span[1] :])
        for test in sorted(base, key=lambda t: (f"test_{stem}" not in t, not uses[t], base[t])):
            if result == "passed" and (not spent or spent + base[test] <= BUDGET):
                spent += base[test]
                shutil.rmtree(root / ".hypothesis", ignore_errors=True)
                result, _ = run_tests(test, 5 * base[test] + 30, 20 * base[test] + 300, log)
                killer = "" if result == "passed" else test
        source.write_bytes(content)
        with out.open("a") as file:
            file.write(json.dumps({**mutant._asdict(), "result": result, "by": killer}) + "\n")
        print(f"{mutant.file}:{mutant.line} {mutant.old!r} -> {mutant.new!r}: {result} {killer}", flush=True)


def area_results(args: argparse.Namespace, area: str) -> list[dict[str, Any]]:
    count = max(1, round(args.count * AREAS[area][0] / sum(share for share, _, _ in AREAS.values())))
    out = args.out.resolve().with_suffix(f".{area}.jsonl")
    with tempfile.TemporaryDirectory(prefix=f"mutants-{area}-") as folder:
        root = copy_tree(args.tree.resolve(), args.shared.resolve(), Path(folder))
        call = f"from pathlib import Path; import runpy; tool = runpy.run_path({str(Path(__file__).resolve())!r})\n"
        call += f"tool['work'](Path({str(root)!r}), {area!r}, {args.seed}, {count}, Path({str(out)!r}))"
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run([root / ".venv/bin/python", "-c", call], check=True, env=env, cwd=root)
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
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        results = [m for found in pool.map(functools.partial(area_results, args), args.areas) for m in found]
    shares = {}
    for area in [*args.areas, "all"]:
        killed = [m["result"] != "passed" for m in results if area in ("all", m["area"])]
        shares[area] = {"mutants": len(killed), "killed": sum(killed), "share": round(sum(killed) / len(killed), 3)}
        print(f"{area}: {sum(killed)} of {len(killed)} killed")
    args.out.write_text(json.dumps({"seed": args.seed, "shares": shares, "mutants": results}, indent=1))


if __name__ == "__main__":
    main()
