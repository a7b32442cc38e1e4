"""The installed package: its contents, what `import fastmum` loads, and a run from a wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastmum

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, **kwargs) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, **kwargs
    ).stdout.strip()


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


def test_import_loads_nothing_heavy():
    heavy = run("import sys, fastmum; print([m for m in ('torch', 'numpy', 'triton', 'skimage') if m in sys.modules])")
    assert heavy == "[]"


def test_the_model_needs_neither_the_compiler_nor_the_extras():
    heavy = "('nvidia.dali', 'flash_attn', 'torch._dynamo')"
    assert run(f"import fastmum, sys; fastmum.MuM; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_public_names():
    assert set(fastmum.__all__) <= set(dir(fastmum))
    assert all(getattr(fastmum, name) is not None for name in fastmum.__all__)
    with pytest.raises(AttributeError, match="Mum"):
        fastmum.Mum  # noqa: B018


def test_kernels_of_this_checkout_are_used_in_any_folder(tmp_path):
    for folder in (ROOT, tmp_path):
        where = run("import fastmum.kernels; print(fastmum.kernels.__file__)", cwd=folder)
        assert Path(where).resolve() == ROOT / "kernels/__init__.py"


def test_kernels_of_another_checkout_are_refused(tmp_path):
    for name in ("fastmum", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=lambda folder, names: set(names) - {"__init__.py"})
    ours, other = ROOT / "fastmum", tmp_path / "kernels"
    code = (
        f"import fastmum; fastmum.__path__[:] = [{str(tmp_path)!r}]\n"
        "try: import fastmum.kernels\nexcept ImportError as error: print(error)"
    )
    message = run(code, cwd=ROOT)
    assert all(text in message for text in (f"'{ours}'", f"'{other}'", "pip install -e ."))
    assert len(message.splitlines()) == 1


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
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    work.mkdir()
    env = {**os.environ, "FASTMUM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ""}

    def command(*words: str) -> str:
        return subprocess.run(words, check=True, capture_output=True, text=True, cwd=work, env=env).stdout

    where = command(str(venv / "bin/python"), "-c", "import fastmum.kernels; print(fastmum.kernels.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    small = ["data.scenes.count=6", "data.frames_per_batch=8", "train.steps=3", "train.eval_batches=1"]
    command(str(venv / "bin/fastmum"), "train", "--config", "quickstart", *small)
    assert (work / "runs/quickstart/reconstruction.png").stat().st_size > 10_000
    command(str(venv / "bin/fastmum"), "launch", "torchrun", "--out", "run.sh")
    assert "image_size: 128" in command("./run.sh", "--config", "quickstart", "--print-config")
