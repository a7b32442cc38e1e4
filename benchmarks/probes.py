"""Training of CAPI's attentive probes on the same features: 30 modules in plain PyTorch, and fastmum's joint heads.

`python -m benchmarks.probes --width 384 --classes 100 --batch 32 --rounds 5`. Weights, tokens and labels are the same;
losses and weights after two steps agree before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from benchmarks.duel import interleave
from benchmarks.reference.recognition import SeparateProbes
from benchmarks.results import FASTMUM, REFERENCE
from benchmarks.step import DisagreementError
from fastmum.engine.device import keep_freed_memory
from fastmum.errors import run_command
from fastmum.tasks.recognition.probes import ATTENTIVE, ClassifierSettings, Probes

TOLERANCE = 1e-3  # of losses and weights, |error| / |expected|; AdamW enlarges the rounding of small gradients


class ProbeComparison:
    """Both with the same weights and a batch of tokens (B, N, D) of noise.

    Args:
        batch, tokens, width, classes: B, N, D and the number of classes.
    """

    def __init__(self, batch: int, tokens: int, width: int, classes: int, device: str = "cpu") -> None:
        settings = ClassifierSettings(batch=256)  # rates are for this batch
        heads = settings.heads([ATTENTIVE])
        torch.manual_seed(0)
        self.ours = Probes(heads, {ATTENTIVE: width}, classes, 256, device=device)
        self.theirs = SeparateProbes([head[1:] for head in heads], width, classes).to(device)
        for i, probe in enumerate(self.theirs):
            probe.load_state_dict({name: stack.detach()[i] for name, stack in self.ours.weights[ATTENTIVE].items()})
        self.x = torch.randn(batch, tokens, width, device=device)
        self.labels = torch.randint(classes, (batch,), device=device)
        self.steps = {
            REFERENCE: lambda: self.theirs.step(self.x, self.labels),
            FASTMUM: lambda: self.ours.step({ATTENTIVE: self.x}, self.labels, 1.0),
        }

    def check(self) -> None:
        """Compare the losses of two steps, and the weights after them without the keys' bias, which has no effect.

        Raises:
            DisagreementError: they differ.
        """
        for number in (1, 2):
            _agree(f"losses of step {number}", *(self.steps[name]() for name in (FASTMUM, REFERENCE)))
        for name, stack in self.ours.weights[ATTENTIVE].items():
            others = torch.stack([probe.get_parameter(name).detach() for probe in self.theirs])
            found = stack.detach()
            if name == "kv.bias":
                found, others = (each[:, each.shape[1] // 2 :] for each in (found, others))
            _agree(f"weights {name}", found, others)


def _agree(what: str, found: Tensor, expected: Tensor) -> None:
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        raise DisagreementError(f"{what} differ by {error:.1e}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=(__doc__ or "").splitlines()[0])
    sizes = {"batch": (32, "images of a step"), "tokens": (196, "of an image"), "width": (384, "of a token"),
             "classes": (100, "of images"), "rounds": (5, "timed steps of each")}  # fmt: skip
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    args = parser.parse_args(argv)
    for name in sizes:
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, but must be at least 1")

    def command() -> None:
        keep_freed_memory()
        comparison = ProbeComparison(args.batch, args.tokens, args.width, args.classes, args.device)
        comparison.check()
        rounds = interleave(comparison.steps, args.rounds, args.device)
        for name, seconds in rounds.items():
            print(f"{name:>10}: {1e3 * median(seconds):8.1f} ms a step (minimum {1e3 * min(seconds):.1f})")
        ratios = [theirs / ours for theirs, ours in zip(rounds[REFERENCE], rounds[FASTMUM], strict=True)]
        print(f"{REFERENCE} / {FASTMUM}: {median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
