"""`make gpu`: what it runs, and what it says of it, without a GPU."""

import pytest
import torch

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


def test_stages(tmp_path):
    tests, benchmarks, profile = stages(tmp_path)
    assert {"tests/kernels", "tests/attention"} <= set(tests.words)
    assert "--quick" not in benchmarks.words
    assert f"--benchmark-json={tmp_path / 'result.json'}" in benchmarks.words
    assert "profile.steps=12-14" in profile.words
    assert "--quick" in stages(tmp_path, quick=True)[1].words
