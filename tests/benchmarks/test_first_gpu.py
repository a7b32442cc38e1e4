"""`python -m benchmarks.gpu`: its driver, and its stages at tiny sizes on a CPU, from a bare checkout."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import wait_for

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import machine as machine_module
from benchmarks.gpu import measure as measure_module
from benchmarks.gpu import page, stages, step
from benchmarks.gpu.efficiency import attention_class
from benchmarks.gpu.record import Record
from benchmarks.gpu.stages import STAGES, TORCH, Stage

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"cuda": True, "gpu": "NVIDIA H200", "versions": "torch 9", "commit": "abc"}
# Stages of the standard library, which note every run.
STAGE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
with open(out.parent / "runs.txt", "a") as runs:
    runs.write(out.stem + "\\n")
found = {{"rows": [{{"what": out.stem, "ms": 1.25}}], "efficiency": {{"cublas": [0.5, 0.75]}}, "notes": [], "headline": "one row"}}
out.write_text(json.dumps(found))
print("the last words")
{rest}
"""  # noqa: E501
PROGRAMS = {
    "good": "",
    "crash": "os.kill(os.getpid(), signal.SIGSEGV)",
    "hang": """
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(out.parent / "child").write_text(str(child.pid))
time.sleep(600)
""",
    "taken": "os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)",
}


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Calls the command with stages of `PROGRAMS` in the place of the real ones; returns exit code and results."""
    package = tmp_path / "root/benchmarks/gpu"
    package.mkdir(parents=True)
    for name, rest in PROGRAMS.items():
        (package / f"{name}.py").write_text(STAGE.format(rest=rest))
    table = {name: Stage(name, f"About {name}", name, 60, needs=()) for name in PROGRAMS}
    table["hang"] = table["hang"]._replace(seconds=2)
    table["absent"] = Stage("absent", "Needs what is not there", "good", 60, needs=("absent_package",))
    table["tool"] = Stage("tool", "Needs a program", "good", 60, needs=(), tool="absent-tool")
    monkeypatch.setitem(stages.PACKAGES, "absent_package", "absent-package")
    for module in (gpu, page, stages, sys.modules["benchmarks.gpu.results"]):
        monkeypatch.setattr(module, "STAGES", table, raising=False)
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "root")
    monkeypatch.setattr(gpu, "GRACE_S", 0.3)
    monkeypatch.setattr(gpu, "find_machine", lambda: dict(MACHINE))
    out = tmp_path / "out"

    def call(*words: str) -> tuple[int, dict]:
        code = gpu.main([*words, "--out", str(out)])
        return code, json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else {}

    call.out = out
    return call


def ran(out: Path) -> list[str]:
    """Names of the stages that ran since the last call."""
    names = (out / "runs.txt").read_text().split()
    (out / "runs.txt").unlink()
    return names


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_hang_or_a_crash_costs_that_stage_only(driver, capsys):
    code, results = driver("--only", "good,crash,hang,absent,tool")
    assert code == 1
    states = {name: stage["state"] for name, stage in results["stages"].items()}
    assert states == {"good": "done", "crash": "failed", "hang": "timed out", "absent": "skipped", "tool": "skipped"}
    for name in ("good", "crash", "hang"):
        assert results["stages"][name]["rows"] == [{"what": name, "ms": 1.25}]
    assert "the last words" in results["stages"]["crash"]["reason"]
    assert "absent-package" in results["stages"]["absent"]["reason"]
    child = int((driver.out / "child").read_text())
    wait_for(lambda: not alive(child))
    text = (driver.out / "BENCHMARKS-h200.md").read_text()
    words = "## About good", "| hang | 1.25 |", "timed out", "Not run: taken", "| cublas |"
    assert all(word in text for word in words)
    assert results["gpu"] == "NVIDIA H200"
    assert results["efficiency"] == {"cublas": {"low": 0.5, "likely": 0.625, "high": 0.75}}
    assert "\n[1/5] good: done" in capsys.readouterr().out


def test_a_second_call_goes_on_with_what_is_not_done(driver):
    assert driver("--only", "good,crash")[0] == 1
    assert ran(driver.out) == ["good", "crash"]
    assert driver("--only", "crash,good,absent")[0] == 1
    assert ran(driver.out) == ["crash"]
    assert driver("--only", "good", "--again")[0] == 0
    assert ran(driver.out) == ["good"]
    # Stages that never ran come first.
    code, results = driver("--only", "crash,taken,hang", "--minutes", "0.5")
    assert ran(driver.out)[0] == "hang"
    assert code == 130
    assert set(results["stages"]) >= {"good", "crash", "hang", "taken"}


def test_a_machine_that_is_taken_away_leaves_what_it_measured(driver):
    code, results = driver("--only", "taken,good")
    assert code == 130
    assert results["stages"]["good"]["state"] == "done"
    assert results["stages"]["taken"]["state"] == "interrupted"
    assert results["stages"]["taken"]["rows"][0]["ms"] == 1.25
    assert signal.getsignal(signal.SIGTERM) is not gpu._interrupt


def test_the_time_for_all_stages_is_kept(driver, capsys):
    began = time.monotonic()
    code, results = driver("--only", "good,crash,hang", "--minutes", "0.05")
    assert code == 1
    assert list(results["stages"]) == ran(driver.out) == ["hang"]  # the only one that may end in three seconds
    assert capsys.readouterr().out.count("no time left") == 2
    assert time.monotonic() - began < 30


def test_refusals(driver, refusal, monkeypatch):
    driver("--only", "good")
    assert "another small" in refusal(gpu.main, "--small", "--out", driver.out)
    assert "another commit" in refusal_with(monkeypatch, refusal, driver.out, commit="def")
    assert "--small" in refusal_with(monkeypatch, refusal, driver.out, cuda=False)
    (driver.out / "results.json").write_text("{}")
    assert "results.json' cannot be continued" in refusal_with(monkeypatch, refusal, driver.out)
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--only", "absence"])


def refusal_with(monkeypatch, refusal, out: Path, **changes) -> str:
    monkeypatch.setattr(gpu, "find_machine", lambda: MACHINE | changes)
    return refusal(gpu.main, "--out", out)


def test_a_machine_without_torch_is_one_line(monkeypatch, refusal, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "benchmarks/gpu").mkdir(parents=True)
    (tmp_path / "benchmarks/gpu/machine.py").write_text("import absent_torch")
    assert "absent_torch" in refusal(gpu.main, "--out", tmp_path / "out")


def test_names_and_peaks():
    assert page.page_name("NVIDIA A100-SXM4-80GB") == "BENCHMARKS-a100-sxm4-80gb.md"
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100"}
    for name, key in names.items():
        assert measure_module.gpu_of(name) is measure_module.GPUS[key]
    others = ["NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA H200 MIG 1g.18gb", "NVIDIA GH200 480GB", "NVIDIA L4"]
    assert [measure_module.gpu_of(name) for name in others] == [None] * 5
    assert attention_class("FA3", "exact", 24) == "fa3_spans"
    assert attention_class("torch cuDNN", "dense", 1) == "cudnn_frames"
    without = ("FA2", "padded", 24), ("FA2", "exact", 1), ("FA4", "exact", 2)
    assert [attention_class(*each) for each in without] == [None] * 3
    assert set(machine_module.describe_machine()) >= {"gpu", "versions", "commit"}


def test_a_cut_on_cuda(monkeypatch, tmp_path):
    """Times of events and of the host, and synchronisations, with torch.cuda replaced."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    modes = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 10**9)

    def one(lap) -> None:
        time.sleep(0.002)
        if modes[-1] == "warn":
            step.warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            step.warnings.warn("Synchronization debug mode ... synchronizing operations", stacklevel=1)

    record = Record(tmp_path / "x.json")
    ms, host = step.measure_cut(record, "2 x 4", one, torch.device("cuda"), 4)
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert (row["syncs"], row["memory_gb"], modes) == (1.0, 3.0, ["warn", "default"])
    assert ms == row["step_ms"] >= 2
    assert host == row["host_ms"] >= 2


def test_failed_tests_are_written_as_they_come(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(x): pass\n")
    (tmp_path / "test_broken.py").write_text("import absent_module\n")
    code = (
        "import sys; from benchmarks.gpu import device_tests as d; from benchmarks.gpu.record import run_stage\n"
        f"d.SMALL, d.ROOT = ({str(tmp_path)!r},), {str(tmp_path)!r}\n"
        f"sys.exit(run_stage('About.', d.measure, ['--small', '--out', {str(tmp_path / 'found.json')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    reasons = {row["test"].rpartition("/")[2]: row["failed"] for row in found["rows"]}
    assert set(reasons) == {"test_some.py::test_b", "test_some.py::test_c", "test_broken.py"}
    assert "absent_module" in reasons["test_broken.py"]
    assert found["headline"] == "1 passed, 0 skipped, 3 failed"
    assert (tmp_path / "tests.xml").exists()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files of a checkout, and an interpreter that finds torch and other packages, but not fastmum."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("fastmum", "kernels", "configs", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / "fastmum" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / "fastmum")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    # Folders named in a .pth file have no .pth files of their own, such as that of an editable installation.
    (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return folder / "fastmum", venv / "bin/python"


def run_small(checkout, out: Path, *words: str) -> tuple[str, dict]:
    folder, python = checkout
    tools = out.parent / "tools"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text('#!/bin/sh\nshift 4\n"$@" && echo "= ERROR SUMMARY: 0 errors"\n')
    (tools / "compute-sanitizer").chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env |= {"PATH": f"{tools}:{env['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    words = [str(python), "-m", "benchmarks.gpu", "--small", "--minutes", "60", "--out", str(out), *words]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((out / "results.json").read_text())


def test_kernels_come_from_a_checkout_that_is_not_installed(checkout, tmp_path):
    folder, python = checkout
    code = "import fastmum.kernels as k; import fastmum.config as c; c.load_config('quickstart'); print(k.__file__)"
    assert run_python(python, code, folder) == str(folder / "kernels/__init__.py")


def run_python(python: Path, code: str, cwd: Path) -> str:
    return subprocess.run([python, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("names", [["products", "attention", "memcheck"], ["step", "library", "graphs"],
                                   ["reference", "resume"], ["tests", "tables"]], ids=",".join)  # fmt: skip
def test_every_stage_on_a_cpu(checkout, tmp_path, names):
    _, results = run_small(checkout, tmp_path / "out", "--only", ",".join(names))
    found = results["stages"]
    assert {name: found[name]["state"] for name in found} == dict.fromkeys(names, "done")
    (text,) = (path.read_text() for path in (tmp_path / "out").glob("BENCHMARKS-*.md"))
    for name in names:
        assert found[name]["headline"] in text
        assert f"`{name}` | done" in text
    rows = {name: found[name]["rows"] for name in names}
    if "products" in names:
        assert [row["agree"] for row in rows["products"] if "agree" in row] == [True] * 7
        assert {row["segments"] for row in rows["attention"]} == {"exact", "padded"}
        assert all(row["error"] < 1e-5 and row["repeats"] for row in rows["attention"])
        assert found["memcheck"]["headline"] == "0 errors"
    if "step" in names:
        losses = [[row["loss"] for row in rows[name] if "loss" in row] for name in names]
        assert losses[0] == losses[2]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    if "reference" in names:
        assert [row["contestant"] for row in rows["reference"]] == ["reference", "fastmum"]
        assert (tmp_path / "out/profile-fastmum.txt").stat().st_size > 1000
        assert found["resume"]["headline"].endswith("the same")
    if "tests" in names:
        assert (tmp_path / "out/tests.xml").exists()
        assert "fastmum" in (tmp_path / "out/tables.md").read_text()


def test_stages_are_consistent():
    assert list(STAGES)[:3] == ["products", "attention", "step"]
    for stage in STAGES.values():
        assert (ROOT / f"benchmarks/gpu/{stage.module}.py").is_file()
        assert set(stage.needs) <= set(stages.PACKAGES)
        assert set(stage.needs) >= set(TORCH)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_installs_nothing(tmp_path):
    words = ["make", "-n", "gpu", f"VENV={tmp_path}", "PYTHON=some-python", "ARGS=--minutes 3"]
    # `make test` sets these for its commands; the test's own make shall not see them.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")}
    out = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "some-python -m benchmarks.gpu --minutes 3"
