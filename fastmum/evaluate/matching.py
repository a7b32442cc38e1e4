"""Dense matching by linear probe (Tables 4 and 13 of the paper; supplement, section B)."""

from __future__ import annotations

from torch import nn

from fastmum.evaluate.features import prepare
from fastmum.evaluate.pairs import PairSet
from fastmum.evaluate.probe import ProbeSettings, train_probes
from fastmum.evaluate.result import Result, measured


def evaluate_matching(
    encoder: nn.Module,
    pairs: PairSet,
    train_pairs: PairSet,
    settings: ProbeSettings | None = None,
    size: int | None = None,
    progress: bool = True,
) -> Result:
    """Train linear probes on frozen features and score the best on other pairs.

    Args:
        encoder: see `patch_features`; on the device that everything is computed on.
        pairs: to test on.
        train_pairs: to train on, each both ways.
        settings: of the probes.
        size: side of the pictures in pixels; None: the test set's own.
        progress: whether to show bars.

    Returns:
        "scores" and "per_pair_epe" of the best probe at its best evaluation, "best" which that was, "probes" every
        evaluation of every probe.

    Raises:
        DataError: a set that cannot be read or does not fit the encoder.
        FloatingPointError: every probe diverged.
    """
    settings, size = settings or ProbeSettings(), size or pairs.size
    device = next(encoder.parameters()).device
    test = prepare(encoder, pairs, size, ("layernorm",), progress)["layernorm"]
    train = prepare(encoder, train_pairs.both_ways(), size, ("layernorm",), progress)["layernorm"]
    trained = train_probes(train, test, settings, device, progress)
    probes = settings.probes()
    probe, evaluation = trained.best
    rate, decay = probes[probe]
    numbers = measured(trained.warps, test.truth) | {
        "best": {"learning_rate": rate, "weight_decay": decay, "step": trained.history[evaluation].step},
        "probes": [
            {
                "learning_rate": rate,
                "weight_decay": decay,
                "evaluations": [
                    {"step": each.step, "train_loss": each.losses[i], **each.scores[i].as_dict()}
                    for each in trained.history
                ],
            }
            for i, (rate, decay) in enumerate(probes)
        ],
        "settings": {
            "size": size,
            "steps": settings.steps,
            "batch": settings.batch,
            "evaluate_every": settings.evaluate_every,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "train_set": train_pairs.name,
            "train_pairs": len(train_pairs.pairs),
        },
    }
    return Result(numbers, trained.warps, size)
