"""What the paper's pretraining runs took (supplement, Table 12, "GPU hours")."""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "MuM, supplement, Table 12"


class PaperRun(NamedTuple):
    """A pretraining run of the paper.

    Args:
        name: of the model in the paper.
        gpus: devices.
        gpu: their kind.
        days: that they ran.
    """

    name: str
    gpus: int
    gpu: str
    days: float

    @property
    def gpu_hours(self) -> float:
        """Hours of all devices together."""
        return self.gpus * self.days * 24


# The table's lighter run carries a footnote of 66 A100 days; its columns, 32 GPUs and 3 days, make 96.
PAPER_RUNS = (PaperRun("MuM", 64, "A100", 3), PaperRun("MuM, lighter", 32, "A100", 3))


def paper_line() -> str:
    """What the paper's runs took, in one line."""
    runs = (
        f"{run.name} {run.gpus} x {run.gpu} x {run.days:g} days = {run.gpu_hours:,.0f} GPU-hours" for run in PAPER_RUNS
    )
    return f"the paper's runs ({SOURCE}): {'; '.join(runs)}"
