"""Imports point one way: which folder of the package may import which, from the code's own import statements."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

BASE = {"errors", "files"}
LIBRARIES = BASE | {"kernels", "geometry", "attention", "model", "config", "engine", "scenes", "data", "pretrained"}
# Folder or module of fastmum: what it may import from the rest of fastmum.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "resources": set(),
    "kernels": {"errors"},
    "geometry": {"errors"},
    "attention": BASE | {"kernels"},
    "model": BASE | {"kernels", "attention"},
    "config": BASE | {"resources", "attention", "model"},
    "engine": BASE | {"kernels", "config"},
    "scenes": BASE | {"geometry"},
    "data": BASE | {"geometry", "scenes", "config"},
    "pretrained": BASE | {"model", "engine"},  # reads training checkpoints
    "capi_loader": BASE | {"model", "engine", "pretrained"},
    "tasks": LIBRARIES,
    "features": LIBRARIES,
    "export": LIBRARIES,
    "report": BASE | {"config", "engine"},
    "evaluate": LIBRARIES | {"tasks", "report"},
    "train": LIBRARIES | {"tasks"},
    "cli": BASE | {"resources"},
    "__init__": {"model", "pretrained"},  # on first use of the public names
}
COMMANDS = {"fastmum/data/plan_table.py": {"model"}}  # compares costs of plans; nothing imports it


def modules() -> Iterator[tuple[str, Path]]:
    """(folder or module of fastmum, source file)."""
    for file in sorted((ROOT / "fastmum").rglob("*.py")):
        yield file.relative_to(ROOT / "fastmum").with_suffix("").parts[0], file
    for file in sorted((ROOT / "kernels").glob("*.py")):
        yield "kernels", file


def imported(file: Path) -> Iterator[str]:
    """Folders or modules of fastmum that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import"
            public = node.module == "fastmum"
            names = [f"fastmum.{alias.name}" for alias in node.names] if public else [str(node.module)]
        yield from (name.split(".")[1] for name in names if name.startswith("fastmum."))


def test_imports_point_one_way():
    wrong = [
        f"{relative} imports {name}"
        for own, file in modules()
        for name in imported(file)
        if name != own and name not in ALLOWED[own] | COMMANDS.get(relative := str(file.relative_to(ROOT)), set())
    ]
    assert not wrong


def test_the_table_is_complete_and_has_no_cycle():
    assert {area for area, _ in modules()} <= set(ALLOWED)
    list(graphlib.TopologicalSorter(ALLOWED).static_order())
