"""`make gpu`: what it runs, and what it says of it, without a GPU."""

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import main, page_name, profile_note, stages
from benchmarks.gpu import test_outcome as outcome

XML = """<testsuites><testsuite tests="5" skipped="1" failures="1" errors="1">
<testcase classname="tests.kernels.test_rope" name="test_a"/><testcase classname="c" name="test_b"/>
<testcase classname="c" name="test_c"><skipped/></testcase>
<testcase classname="c" name="test_d"><failure/></testcase><testcase classname="c" name="test_e"><error/></testcase>
</testsuite></testsuites>"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(tmp_path, capsys):
    assert main(["--folder", str(tmp_path / "gpu")]) == 2
    assert capsys.readouterr().err == (
        "error: torch sees no CUDA device: `make gpu` measures a GPU, `make benchmark` a CPU\n"
    )
    assert not (tmp_path / "gpu").exists()


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H200", "BENCHMARKS-h200.md"), ("NVIDIA A100-SXM4-80GB", "BENCHMARKS-a100-sxm4-80gb.md"),
     ("NVIDIA GeForce RTX 4090", "BENCHMARKS-geforce-rtx-4090.md")],
)  # fmt: skip
def test_page_is_named_after_the_gpu(gpu, name):
    assert page_name(gpu) == name


def test_outcome_of_tests(tmp_path):
    assert outcome(tmp_path, "X") == "**Tests of the kernels and backends on X: they did not finish.**"
    (tmp_path / "tests.xml").write_text(XML)
    sentence = outcome(tmp_path, "X")
    assert "2 passed, 1 skipped, 2 failed: `c.test_d`, `c.test_e`" in sentence
    (tmp_path / "tests.xml").write_text(XML.replace("<failure/>", "").replace("<error/>", ""))
    assert outcome(tmp_path, "X") == "Tests of the kernels and backends on X: 4 passed, 1 skipped, 0 failed."


def test_profile(tmp_path):
    assert "not written" in profile_note(tmp_path)
    folder = tmp_path / "run" / "profile"
    folder.mkdir(parents=True)
    (folder / "steps_12-14_rank_0.txt").write_text("Name  Self CUDA\naten::mm  3 ms\n" + "more\n" * 100)
    note = profile_note(tmp_path)
    assert "aten::mm  3 ms" in note
    assert note.count("more") == 22


@pytest.fixture
def machine(monkeypatch):
    """A GPU that is not there, and stages that end with a code and leave what they are told to."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")

    def outcomes(folder, codes: dict[str, int], files: dict[str, str]):
        def run(stage) -> int:
            for name, text in files.items() if stage.name == "tests" else ():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
            return codes.get(stage.name, 0)

        monkeypatch.setattr(gpu, "run", run)

    return outcomes


def test_benchmarks_that_die_leave_a_page(machine, tmp_path, capsys):
    folder, out = tmp_path / "gpu", tmp_path / "docs" / "BENCHMARKS-h200.md"
    files = {"tests.xml": XML, "result.json": "", "run/profile/steps_12-14_rank_0.txt": "aten::mm  3 ms"}
    machine(folder, {"tests": 1, "benchmarks": -9}, files)
    assert main(["--folder", str(folder), "--out", str(out)]) == 1
    page = out.read_text()
    assert "2 passed, 1 skipped, 2 failed: `c.test_d`, `c.test_e`" in page
    assert "What failed: tests, benchmarks." in page
    assert "aten::mm  3 ms" in page
    assert str(tmp_path) not in page
    assert "is no JSON" in capsys.readouterr().err


def test_profile_of_another_time_is_not_shown(machine, tmp_path):
    folder, out = tmp_path / "gpu", tmp_path / "BENCHMARKS-h200.md"
    old = folder / "run" / "profile" / "steps_12-14_rank_0.txt"
    old.parent.mkdir(parents=True)
    old.write_text("of yesterday")
    machine(folder, {}, {})
    assert main(["--folder", str(folder), "--out", str(out)]) == 1
    assert "The profile was not written" in out.read_text()
    assert not old.exists()


def test_profile_of_a_trainer_that_failed_is_not_shown(machine, tmp_path):
    folder, out = tmp_path / "gpu", tmp_path / "BENCHMARKS-h200.md"
    machine(folder, {"profile": 1}, {"run/profile/steps_12-14_rank_0.txt": "of half a run"})
    assert main(["--folder", str(folder), "--out", str(out)]) == 1
    page = out.read_text()
    assert "of half a run" not in page
    assert "No profile: the trainer failed" in page
    assert "What failed: profile, benchmarks." in page


def test_a_page_for_a_gpu_that_cannot_be_written_is_an_error(machine, tmp_path, capsys):
    machine(tmp_path / "gpu", {}, {})
    (tmp_path / "file").write_text("")
    assert main(["--folder", str(tmp_path / "gpu"), "--out", str(tmp_path / "file" / "PAGE.md")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_stages(tmp_path):
    tests, benchmarks, profile = stages(tmp_path)
    assert {"tests/kernels", "tests/attention"} <= set(tests.words)
    assert "--quick" not in benchmarks.words
    assert f"--benchmark-json={tmp_path / 'result.json'}" in benchmarks.words
    assert "profile.steps=12-14" in profile.words
    assert "--quick" in stages(tmp_path, quick=True)[1].words
