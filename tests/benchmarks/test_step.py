"""The benchmark of the training step, at a tiny size."""

import pytest

from benchmarks.contestant import RemoteContestant
from benchmarks.step import build_fastmum, main
from fastmum.config import ConfigError
from fastmum.model.compile import has_cpp_compiler

TINY = ["model.preset=mum_tiny", "data.image_size=32", "model.compile=off"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prints_phases_and_ratio(capsys, tmp_path, precision):
    profile = tmp_path / "profile.txt"
    argv = ["--frames=4", "--views=2", "--rounds=2", "--eager-only", f"--profile={profile}"]
    assert main([*argv, f"train.precision={precision}", *TINY]) == 0
    header, *rows, ratio = capsys.readouterr().out.splitlines()
    assert header.split() == ["ms", "forward", "backward", "norm", "optimizer", "step"]
    assert [row.split()[:2] for row in rows] == [[n, s] for n in ("reference", "fastmum") for s in ("median", "min")]
    assert ratio.startswith("reference / fastmum: ")
    assert profile.read_text().count("Self CPU time total") == 2


@pytest.mark.exhaustive
@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler")
def test_the_compiled_reference(capsys):
    sizes = ["model.depth=1", "model.decoder_depth=2"]
    assert main(["--frames=4", "--views=2", "--rounds=1", "train.precision=fp32", *TINY, *sizes]) == 0
    out = capsys.readouterr().out
    assert out.count("compiled") == 3
    assert "\ncompiled / fastmum: " in out


@pytest.mark.slow
def test_errors_of_another_process_are_raised():
    with pytest.raises(ConfigError, match="stepz"):
        RemoteContestant(build_fastmum, 4, 2, ["train.stepz=3"])


def test_invalid_arguments(refusal):
    assert "--frames is 5" in refusal(main, "--frames=5", "--views=2")
    assert "model.p" in refusal(main, "model.p=x")
