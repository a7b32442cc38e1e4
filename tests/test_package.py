"""The package: what imports what, its contents, what `import fastmum` loads, and a run from a wheel."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastmum
from benchmarks.reference import step as reference_step
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD

ROOT = Path(__file__).resolve().parents[1]

BASE = {"errors", "files", "progress", "measured"}
LIBRARIES = BASE | {"kernels", "geometry", "attention", "model", "config", "engine", "scenes", "data", "pretrained"}
# Folder or module of fastmum: what it may import from the rest of fastmum.
ALLOWED: dict[str, set[str]] = {
    "errors": set(), "files": set(), "progress": set(), "measured": {"files"}, "kernels": {"errors"},
    "geometry": {"errors"},
    "attention": BASE | {"kernels"},
    "model": BASE | {"kernels", "attention"},
    "config": BASE | {"attention", "model"},
    "engine": BASE | {"kernels", "config"},
    "scenes": BASE | {"geometry"},
    "data": BASE | {"geometry", "scenes", "config"},
    "pretrained": BASE | {"model", "config", "engine"},  # reads training checkpoints
    "capi_loader": BASE | {"model", "engine", "pretrained"},
    "features": LIBRARIES, "export": LIBRARIES, "tasks": LIBRARIES | {"features"},
    "report": BASE | {"config", "engine"},
    "predict": LIBRARIES | {"features", "tasks"},
    "evaluate": LIBRARIES | {"features", "tasks", "report"},
    "train": LIBRARIES | {"tasks"},
    "cli": BASE,
    "__init__": {"model", "pretrained"},  # on first use of the public names
}  # fmt: skip
COMMANDS = {"fastmum/data/plan_table.py": {"model"}}  # compares costs of plans; nothing imports it


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import"
            public = node.module == "fastmum"
            yield from (f"fastmum.{alias.name}" for alias in node.names) if public else [str(node.module)]


def test_imports_point_one_way():
    wrong, areas = [], set()
    for file in sorted([*ROOT.glob("fastmum/**/*.py"), *ROOT.glob("kernels/*.py")]):
        relative = file.relative_to(ROOT).as_posix()
        own = relative.removeprefix("fastmum/").removesuffix(".py").split("/")[0]
        names = {name.split(".")[1] for name in imported(file) if name.startswith("fastmum.")}
        areas.add(own)
        assert own == "progress" or "tqdm" not in imported(file), f"{relative}: use fastmum.progress"
        wrong += [(relative, name) for name in names - ALLOWED[own] - COMMANDS.get(relative, set()) - {own}]
    assert not wrong
    assert {"engine", "kernels", "train"} <= areas
    list(graphlib.TopologicalSorter(ALLOWED).static_order())  # raises if there is a cycle


def test_the_reference_shares_no_code_with_fastmum():
    allowed = {*sys.stdlib_module_names, "torch", "PIL", "numpy"}
    files = sorted(Path(reference_step.__file__).parent.glob("**/*.py"))
    assert {file.name for file in files} >= {"model.py", "step.py"}
    modules = {name for file in files for name in imported(file) if not name.startswith("benchmarks.reference")}
    assert {name.split(".")[0] for name in modules} <= allowed
    assert (reference_step.IMAGENET_MEAN, reference_step.IMAGENET_STD) == (IMAGENET_MEAN, IMAGENET_STD)


def run(code: str, **kwargs) -> str:
    return subprocess.check_output([sys.executable, "-c", code], text=True, **kwargs).strip()


def test_imports_load_nothing_heavy():
    for code, heavy in (
        ("import fastmum", ("torch", "numpy", "triton", "skimage")),
        ("import fastmum; fastmum.MuM", ("nvidia.dali", "flash_attn", "torch._dynamo")),
    ):
        assert run(f"import sys; {code}; print([name for name in {heavy} if name in sys.modules])") == "[]"
    assert all(getattr(fastmum, name) is not None for name in fastmum.__all__)
    assert set(fastmum.__all__) <= set(dir(fastmum))
    with pytest.raises(AttributeError, match="Mum"):
        fastmum.Mum  # noqa: B018


def test_kernels_of_this_checkout_are_used_and_of_another_refused(tmp_path):
    where = run("import fastmum.kernels; print(fastmum.kernels.__file__)", cwd=tmp_path)
    assert Path(where).resolve() == ROOT / "kernels/__init__.py"
    for name in ("fastmum", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=lambda folder, names: set(names) - {"__init__.py"})
    message = run(
        f"import fastmum; fastmum.__path__[:] = [{str(tmp_path)!r}]\n"
        "try: import fastmum.kernels\nexcept ImportError as error: print(error)", cwd=ROOT
    )  # fmt: skip
    assert all(text in message for text in (f"'{ROOT / 'fastmum'}'", f"'{tmp_path / 'kernels'}'", "pip install -e ."))
    assert len(message.splitlines()) == 1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, because setuptools keeps files of earlier builds in build/
    for name in ("fastmum", "kernels", "configs", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(words, check=True, capture_output=True)
    return next(folder.glob("fastmum-*.whl"))


def test_the_wheel_holds_one_package_with_kernels_configurations_and_launchers(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"fastmum", f"fastmum-{fastmum.__version__}.dist-info"}
    for inside, pattern in {"fastmum": "**/*.*", "kernels": "*.py", "configs": "**/*.yaml", "launch": "*.sh"}.items():
        files = {str(f.relative_to(ROOT)) for f in (ROOT / inside).glob(pattern) if f.suffix != ".pyc"}
        assert files
        assert {file if inside == "fastmum" else f"fastmum/{file}" for file in files} <= names


@pytest.mark.slow
def test_the_quickstart_runs_from_a_wheel_in_an_empty_folder(wheel, tmp_path):
    venv, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    env = {**os.environ, "FASTMUM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ""}

    def command(*words: str | Path) -> str:
        return subprocess.run(words, check=True, capture_output=True, text=True, cwd=work, env=env).stdout

    command(sys.executable, "-m", "venv", "--without-pip", venv)
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    python = venv / "bin/python"
    command(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    where = command(python, "-c", "import fastmum.kernels; print(fastmum.kernels.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    small = ["data.scenes.count=6", "data.frames_per_batch=8", "train.steps=3", "train.eval_batches=1"]
    command(venv / "bin/fastmum", "train", "--config", "quickstart", *small)
    assert (work / "runs/quickstart/reconstruction.png").stat().st_size > 10_000
    command(venv / "bin/fastmum", "launch", "torchrun", "--out", "run.sh")
    assert "image_size: 128" in command("./run.sh", "--config", "quickstart", "--print-config")
