"""Overhead of the training loop over forward, backward and update in the quickstart."""

import pytest

from benchmarks.duel import Duel
from benchmarks.loop import measure
from benchmarks.results import FASTMUM, REFERENCE
from benchmarks.sizes import Sizes


def test_loop(duel: Duel, sizes: Sizes, quick: bool) -> None:
    if sizes.device.type != "cpu":
        pytest.skip("on a GPU calls return before their work is done")
    small = ["data.image_size=32", "data.frames_per_batch=8", "data.views=[2,4]"] if quick else []
    steps = measure([f"train.precision={sizes.precision}", *small], 20 if quick else 40)
    rounds = {REFERENCE: [inside for _, inside in steps], FASTMUM: [whole for whole, _ in steps]}
    duel.record("training loop", "a step (reference: its forward, backward and update)", rounds)
