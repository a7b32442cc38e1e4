"""The table of the modes, by hand for two ranks, and its command."""

import pytest

from fastmum.data.plan_table import PlanCost, main, operations, table
from fastmum.model.config import PRESETS


def test_operations_of_the_paper_s_model():
    """By hand: 24 blocks of width 1024 on 64 tokens, 12 of width 768 on 256."""
    cost = operations(PRESETS["mum_vitl16"])
    encoder = 24 * (24 * 64 * 1024**2 + 4 * 64**2 * 1024)
    decoder = 12 * 24 * 256 * 768**2 + 6 * 4 * 256**2 * 768
    assert cost == PlanCost(encoder + decoder, 6 * 4 * 256**2 * 768)


def test_full_and_level_batches_gain():
    rows = {(row.ranks, row.mode): row for row in table((1, 64), 40, operations(PRESETS["mum_vitl16"]))}
    assert rows[64, "paper"].speed == 1
    assert rows[64, "paper"].fill == pytest.approx(0.957, abs=0.005)
    assert rows[64, "packed"].fill == rows[64, "balanced"].fill == 1
    assert rows[64, "packed"].speed == pytest.approx(1.12, abs=0.03)
    assert rows[64, "balanced"].speed == pytest.approx(1.20, abs=0.02)
    assert rows[64, "balanced"].imbalance < 1.02
    assert rows[1, "balanced"].speed == pytest.approx(1, abs=0.03)


def test_the_command_prints_markdown(capsys):
    assert main(["--steps", "2", "--ranks", "1", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| 4 |")]) == 3


def test_the_command_refuses_in_one_line(capsys):
    words = ["--steps", "1", "--ranks", "1", "--frames-per-gpu", "97", "--views", "24", "24", "--imagenet-share", "0"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "data.views" in error
    assert error.count("\n") == 1
