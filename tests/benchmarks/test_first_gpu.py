"""`make gpu` without a GPU: its page."""

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import main, page_name, profile_note
from benchmarks.gpu import test_outcome as outcome_of

XML = """<testsuites><testsuite tests="5" skipped="1" failures="1" errors="1">
<testcase classname="tests.kernels.test_rope" name="test_a"/><testcase classname="c" name="test_b"/>
<testcase classname="c" name="test_c"><skipped/></testcase>
<testcase classname="c" name="test_d"><failure/></testcase><testcase classname="c" name="test_e"><error/></testcase>
</testsuite></testsuites>"""
PROFILE = "run/profile/steps_12-14_rank_0.txt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, refusal):
    assert "make benchmark" in refusal(main, "--folder", tmp_path / "gpu")
    assert not (tmp_path / "gpu").exists()


def test_parts_of_the_page(tmp_path):
    assert page_name("NVIDIA A100-SXM4-80GB") == "BENCHMARKS-a100-sxm4-80gb.md"
    assert "did not finish" in outcome_of(tmp_path, "X")
    (tmp_path / "tests.xml").write_text(XML.replace("<failure/>", "").replace("<error/>", ""))
    assert outcome_of(tmp_path, "X").endswith("on X: 4 passed, 1 skipped, 0 failed.")
    (tmp_path / PROFILE).parent.mkdir(parents=True)
    (tmp_path / PROFILE).write_text("aten::mm  3 ms\n" + "more\n" * 100)
    assert profile_note(tmp_path).count("more") == 23


def test_failed_stages_leave_a_page_without_old_profiles(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    folder, out = tmp_path / "gpu", tmp_path / "docs/PAGE.md"

    def page_of(codes: dict[str, int], files: dict[str, str]) -> str:
        """The page after stages that exit with these codes and leave these files."""

        def run(stage) -> int:
            for name, text in files.items() if stage.name == "tests" else ():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
            return codes.get(stage.name, 0)

        monkeypatch.setattr(gpu, "run", run)
        assert main(["--folder", str(folder), "--out", str(out)]) == 1
        return out.read_text()

    (folder / PROFILE).parent.mkdir(parents=True)
    (folder / PROFILE).write_text("of an earlier run")
    assert "The profile was not written" in page_of({}, {})
    page = page_of({"profile": 1}, {PROFILE: "of a failed run"})
    assert "of a failed run" not in page
    assert "Failed: profile, benchmarks." in page
    files = {"tests.xml": XML, "result.json": "", PROFILE: "aten::mm  3 ms"}
    page = page_of({"tests": 1, "benchmarks": -9}, files)
    outcome = "2 passed, 1 skipped, 2 failed: `c.test_d`, `c.test_e`"
    assert all(text in page for text in (outcome, "Failed: tests, benchmarks.", "aten::mm  3 ms"))
    assert str(tmp_path) not in page
    assert "result.json" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["--folder", str(folder), "--out", str(tmp_path / "file/PAGE.md")]) == 2
    assert "file' cannot be written" in capsys.readouterr().err
