"""Costs and the table of the modes, and its command."""

import pytest

from fastmum.data.plan_table import main, operations, table
from fastmum.model.config import PRESETS, step_flops


def test_costs_are_those_of_a_step():
    cost, lengths = operations(PRESETS["mum_vitl16"]), [24, 5, 5, 2, 1]
    total = sum(lengths) * cost.frame + sum(views**2 for views in lengths) * cost.pair
    assert total == pytest.approx(step_flops(PRESETS["mum_vitl16"], 256, 64, lengths).total)


def test_full_and_level_batches_are_faster():
    rows = {(row.ranks, row.mode): row for row in table((1, 64), 40, operations(PRESETS["mum_vitl16"]))}
    assert rows[64, "paper"].speed == 1
    assert rows[64, "paper"].fill == pytest.approx(0.957, abs=0.005)
    assert rows[64, "packed"].fill == rows[64, "balanced"].fill == 1
    assert rows[64, "packed"].speed == pytest.approx(1.12, abs=0.03)
    assert rows[64, "balanced"].speed == pytest.approx(1.19, abs=0.02)
    assert rows[64, "balanced"].imbalance < 1.02
    assert rows[1, "balanced"].speed == pytest.approx(1, abs=0.03)


def test_the_command_prints_markdown_or_one_line_of_error(capsys):
    assert main(["--steps", "2", "--ranks", "1", "4"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 |")]) == 3
    words = ["--steps", "1", "--ranks", "1", "--frames-per-gpu", "97", "--views", "24", "24", "--imagenet-share", "0"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "data.views" in error
    assert error.count("\n") == 1
