"""Cost of raggedness: packed sequences of different lengths against equal ones, per FLOP."""

from benchmarks.duel import Duel, no_collection, rotated
from benchmarks.results import FASTMUM, REFERENCE
from benchmarks.sizes import Sizes
from benchmarks.step import fastmum_steps, make_problem
from fastmum.model.config import step_flops

CUTS = {4: [(1, 3)], 8: [(3, 5), (1, 2, 5)], 96: [(24, 24, 24, 24), (24, 20, 16, 12, 10, 6, 4, 2, 2), (2,) * 48]}
ROUNDS = 3


def test_ragged_batches(duel: Duel, sizes: Sizes) -> None:
    """Seconds per TFLOP of the model; the reference is fastmum on sequences of equal length."""
    settings = [*sizes.settings, *([] if sizes.device.type == "cuda" else ["model.compile=off"])]
    problem = make_problem(sizes.frames, sizes.frames, settings)
    equal = (sizes.views,) * (sizes.frames // sizes.views)
    cuts = [equal, *CUTS[sizes.frames]]
    steps = dict(zip(cuts, fastmum_steps(problem, cuts), strict=True))
    for step in steps.values():
        step()
        step.rounds.clear()
    with no_collection():
        for number in range(ROUNDS):
            for cut in rotated(cuts, number):
                steps[cut]()

    def seconds_per_tflop(cut: tuple[int, ...]) -> list[float]:
        flops = step_flops(sizes.model, sizes.patches, sizes.visible, cut).total
        return [times["step"] / flops * 1e12 for times in steps[cut].rounds]

    for cut in cuts[1:]:
        views = f"{cut[0]} x {len(cut)}" if len(set(cut)) == 1 else " + ".join(map(str, cut))
        rounds = {REFERENCE: seconds_per_tflop(equal), FASTMUM: seconds_per_tflop(cut)}
        reference = f"{len(equal)} x {sizes.views}"
        duel.record("ragged batches", f"{views} views, TFLOP of a step (reference: {reference})", rounds)
