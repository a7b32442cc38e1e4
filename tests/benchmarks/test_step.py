"""The benchmark of the training step, at a size that takes no time."""

import pytest

from benchmarks.contestant import Apart
from benchmarks.step import Comparison, build_fastmum, main
from fastmum.config import ConfigError
from fastmum.model.compile import has_cpp_compiler

TINY = ["model.preset=mum_tiny", "data.image_size=32", "model.compile=off"]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_prints_both_and_their_ratio(capsys, tmp_path, precision):
    profile = tmp_path / "profile.txt"
    argv = ["--frames=4", "--views=2", "--rounds=2", "--eager-only", f"--profile={profile}"]
    assert main([*argv, f"train.precision={precision}", *TINY]) == 0
    header, *rows, ratio = capsys.readouterr().out.splitlines()
    assert header.split() == ["ms", "forward", "backward", "norm", "optimizer", "step"]
    assert [row.split()[:2] for row in rows] == [[n, s] for n in ("reference", "fastmum") for s in ("median", "min")]
    assert ratio.startswith("reference / fastmum: ")
    assert profile.read_text().count("Self CPU time total") == 2


@pytest.mark.slow
def test_phases_add_up_to_the_step():
    comparison = Comparison(4, 2, TINY, compiled=False)
    comparison.check()
    comparison.run(rounds=1)
    for contestant in comparison.contestants.values():
        (times,) = contestant.rounds
        step = times.pop("step")
        assert 0 < sum(times.values()) <= step
    comparison.close()


@pytest.mark.slow
def test_different_results_have_no_speed():
    comparison = Comparison(4, 2, TINY, compiled=False)
    comparison.contestants["reference"]()  # one step ahead
    with pytest.raises(AssertionError, match=r"loss of step 1: reference .*, fastmum"):
        comparison.check()
    comparison.close()


@pytest.mark.exhaustive
@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler")
def test_the_compiled_reference_takes_part(capsys):
    sizes = ["model.depth=1", "model.decoder_depth=2"]
    assert main(["--frames=4", "--views=2", "--rounds=1", "train.precision=fp32", *TINY, *sizes]) == 0
    out = capsys.readouterr().out
    assert out.count("compiled") == 3
    assert "\ncompiled / fastmum: " in out


def test_what_fails_there_is_told_here():
    with pytest.raises(ConfigError, match="stepz"):
        Apart(build_fastmum, 4, 2, ["train.stepz=3"])


def test_unusable_arguments_are_one_line(capsys):
    assert main(["--frames=5", "--views=2"]) == 2
    assert capsys.readouterr().err == "error: --frames is 5, but must be a positive multiple of --views, which is 2\n"
    assert main(["model.presett=mum_tiny"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
