"""What is installed, and how light `import fastmum` is."""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import fastmum

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, **kwargs) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, **kwargs
    ).stdout.strip()


def test_import_loads_nothing_heavy():
    heavy = run("import sys, fastmum; print([m for m in ('torch', 'numpy', 'triton', 'skimage') if m in sys.modules])")
    assert heavy == "[]"


def test_public_names_are_found_and_others_are_not():
    assert set(fastmum.__all__) <= set(dir(fastmum))
    assert all(getattr(fastmum, name) is not None for name in fastmum.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Mum'"):
        fastmum.Mum  # noqa: B018


def test_using_the_model_needs_no_gpu_and_none_of_the_extras():
    code = "import fastmum, sys; fastmum.MuM; print([m for m in ('nvidia.dali', 'flash_attn') if m in sys.modules])"
    began = time.monotonic()
    assert run(code) == "[]"
    assert time.monotonic() - began < 60  # a hang, not a speed: the speed is in the benchmarks


def test_the_model_comes_without_the_compiler():
    assert run("import fastmum, sys; fastmum.MuM; print('torch._dynamo' in sys.modules)") == "False"


def test_kernels_are_a_part_of_fastmum_wherever_it_is_run_from(tmp_path):
    for folder in (ROOT, tmp_path):
        where = run("import fastmum.kernels; print(fastmum.kernels.__file__)", cwd=folder)
        assert Path(where) == ROOT / "kernels/__init__.py"


def test_the_wheel_holds_the_kernels_under_fastmum_and_nothing_else(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("fastmum-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names} == {"fastmum", f"fastmum-{fastmum.__version__}.dist-info"}
    assert {"fastmum/kernels/__init__.py", "fastmum/kernels/reference.py", "fastmum/train.py"} <= set(names)
    where = run(
        "import fastmum.kernels, fastmum; print(fastmum.kernels.__file__, fastmum.MuM.__module__)",
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert where == f"{tmp_path}/site/fastmum/kernels/__init__.py fastmum.model.mum"
