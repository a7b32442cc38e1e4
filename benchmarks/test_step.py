"""The training step at full size against the released model's in plain PyTorch: the figure that fastmum is for."""

import os

import pytest

from benchmarks.step import Comparison

FRAMES, VIEWS, ROUNDS = 8, 4, 4
MEMORY = 16e9  # bytes: weights, gradients and moments of two models of 390 M parameters


@pytest.mark.skipif(
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < MEMORY,
    reason=f"two models of 390 M parameters in training want {MEMORY / 1e9:.0f} GB of memory",
)
def test_full_size_step(benchmark, capsys):
    comparison = Comparison(FRAMES, VIEWS, ["model.preset=mum_vitl16", "model.compile=off"])
    comparison.check()

    def reference_has_its_turn() -> None:  # before every round, so that both are timed under the same conditions
        comparison.reference()

    benchmark.pedantic(comparison.fastmum, setup=reference_has_its_turn, rounds=ROUNDS)
    benchmark.extra_info.update(frames=FRAMES, views=VIEWS, reference_over_fastmum=comparison.ratio())
    with capsys.disabled():
        print(f"\n{comparison.table()}")
    comparison.close()
