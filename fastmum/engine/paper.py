"""Cost of the paper's pretraining runs (supplement, Table 12, "GPU hours")."""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "MuM, supplement, Table 12"


class PaperRun(NamedTuple):
    """A pretraining run of the paper."""

    name: str
    gpus: int
    gpu: str
    days: float

    @property
    def gpu_hours(self) -> float:
        """Hours of all devices together."""
        return self.gpus * self.days * 24


# A footnote gives 66 A100 days for the lighter run; its columns, 32 GPUs and 3 days, make 96.
PAPER_RUNS = (PaperRun("MuM", 64, "A100", 3), PaperRun("MuM, lighter", 32, "A100", 3))


def paper_line() -> str:
    """The paper's runs in one line."""
    runs = (f"{r.name} {r.gpus} x {r.gpu} x {r.days:g} days = {r.gpu_hours:,.0f} GPU-hours" for r in PAPER_RUNS)
    return f"the paper's runs ({SOURCE}): {'; '.join(runs)}"
