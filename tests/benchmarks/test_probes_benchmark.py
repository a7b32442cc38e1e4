"""The benchmark of probes at a tiny size."""

import pytest

from benchmarks.probes import ProbeComparison, main
from benchmarks.step import DisagreementError


def test_the_benchmark_compares_before_it_times(capsys):
    assert main(["--batch", "4", "--tokens", "9", "--width", "64", "--classes", "5", "--rounds", "2"]) == 0
    assert "reference / fastmum: " in capsys.readouterr().out
    comparison = ProbeComparison(4, 9, 64, 5)
    comparison.steps["reference"]()  # one step ahead
    with pytest.raises(DisagreementError, match="losses of step 1"):
        comparison.check()
    with pytest.raises(SystemExit):
        main(["--width", "0"])
