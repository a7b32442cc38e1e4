"""What the training loop adds to forward, backward and update, in the quickstart's run."""

import pytest

from benchmarks.duel import Duel
from benchmarks.loop import measure
from benchmarks.results import FASTMUM, REFERENCE
from benchmarks.sizes import Sizes


def test_loop(duel: Duel, sizes: Sizes, quick: bool) -> None:
    """On a CPU, where a call ends when its work is done."""
    if sizes.device.type != "cpu":
        pytest.skip("on a GPU the host runs ahead: the time of its calls is not that of the work")
    small = ["data.image_size=32", "data.frames_per_batch=8", "data.views=[2,4]"] if quick else []
    steps = measure([f"train.precision={sizes.precision}", *small], 20 if quick else 40)
    rounds = {REFERENCE: [inside for _, inside in steps], FASTMUM: [whole for whole, _ in steps]}
    duel.record("training loop", "a step (reference: its forward, backward and update alone)", rounds)
