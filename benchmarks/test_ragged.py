"""Packed sequences of different lengths against equal ones, per operation: what raggedness itself costs."""

from statistics import median

from benchmarks.step import fastmum_steps, make_problem
from fastmum.model.flops import step_flops

FRAMES, ROUNDS = 8, 4
EQUAL = (4, 4)
RAGGED = [(3, 5), (1, 2, 5), (1, 7), (2, 3, 3)]
PATCHES, VISIBLE = 256, 64


def test_ragged_batches_cost_what_their_operations_cost(benchmark, capsys):
    problem = make_problem(FRAMES, FRAMES, ["model.preset=mum_vitl16", "model.compile=off"])
    lengths = [EQUAL, *RAGGED]
    steps = fastmum_steps(problem, lengths)
    for step in steps:
        step()
        step.rounds.clear()

    def everyone_has_a_turn() -> None:  # round by round, so that all are timed under the same conditions
        for step in steps[1:]:
            step()

    benchmark.pedantic(steps[0], setup=everyone_has_a_turn, rounds=ROUNDS)
    rows = []
    for of_sequences, step in zip(lengths, steps, strict=True):
        flops = step_flops(problem.config.model_config, PATCHES, VISIBLE, of_sequences).total
        rows.append((of_sequences, flops, step.milliseconds(median)["step"], step.milliseconds(min)["step"]))
    _, flops, middle, least = rows[0]
    with capsys.disabled():
        print(f"\n{'views':>12} {'TFLOP':>7} {'ms':>7} {'per FLOP, median':>18} {'least':>7}")
        for name, of_row, ms, ms_least in rows:
            per_flop, per_flop_least = (ms / middle) / (of_row / flops), (ms_least / least) / (of_row / flops)
            sizes = " ".join(map(str, name))
            print(f"{sizes:>12} {of_row / 1e12:7.3f} {ms:7.0f} {per_flop:18.3f} {per_flop_least:7.3f}")
    benchmark.extra_info["per_flop"] = {
        " ".join(map(str, name)): (ms / middle) / (of_row / flops) for name, of_row, ms, _ in rows
    }
