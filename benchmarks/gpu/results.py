"""All findings of a folder: results.json, which predictions read (`benchmarks.offline --efficiency`), and the page."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import page
from benchmarks.gpu.efficiency import table
from benchmarks.gpu.record import write_json
from benchmarks.gpu.stages import STAGES

DONE, FAILED, TIMED_OUT, SKIPPED = "done", "failed", "timed out", "skipped"
RUNNING, INTERRUPTED = "running", "interrupted"
NOTHING: dict[str, Any] = {"rows": [], "efficiency": {}, "notes": [], "headline": ""}


class ResultsError(Exception):
    """Results that the new ones cannot join; one line."""


class Results:
    """Findings of a folder on one machine.

    Args:
        folder: where they are; created.
        machine: of `benchmarks.gpu.machine`, with "small".

    Raises:
        ResultsError: the folder holds results of another machine, commit or size.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, machine: Mapping[str, Any]) -> None:
        self.folder, self.machine = folder, dict(machine)
        self.file = folder / "results.json"
        self.stages: dict[str, dict[str, Any]] = {}  # state, seconds and findings by name
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self._continue()

    def _continue(self) -> None:
        try:
            before = json.loads(self.file.read_text(encoding="utf-8"))
            machine, self.stages = before["machine"], before["stages"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"'{self.file}' cannot be continued ({error!r}): choose another --out") from None
        for key in ("gpu", "versions", "commit", "small"):
            if machine.get(key) != self.machine[key]:
                raise ResultsError(
                    f"'{self.folder}' has results of another {key} ({machine.get(key)}, not {self.machine[key]}): "
                    "choose another --out"
                )

    def state(self, name: str) -> str | None:
        """Of a stage; None if it never ran."""
        return self.stages.get(name, {}).get("state")

    def set(self, name: str, state: str, seconds: float = 0.0, reason: str = "") -> None:
        """Take the state and the findings so far of a stage, and write everything."""
        try:
            found = json.loads(self.findings(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = NOTHING  # nothing written
        self.stages[name] = {"state": state, "seconds": round(seconds, 1), "reason": reason} | found
        self.write()

    def findings(self, name: str) -> Path:
        """The file that a stage writes."""
        return self.folder / f"{name}.json"

    def log(self, name: str) -> Path:
        """The output of a stage."""
        return self.folder / f"{name}.log"

    @property
    def page(self) -> Path:
        """The page."""
        return self.folder / page.page_name(self.machine["gpu"])

    def write(self) -> None:
        """Replace results.json and the page."""
        shares: dict[str, list[float]] = {}
        for stage in self.stages.values():
            for kind, some in stage["efficiency"].items():
                shares.setdefault(kind, []).extend(some)
        stages = {name: self.stages[name] for name in STAGES if name in self.stages}
        content = {
            "gpu": self.machine["gpu"], "date": time.strftime("%Y-%m-%d"), "efficiency": table(shares),
            "machine": self.machine, "stages": stages,
        }  # fmt: skip
        write_json(self.file, content)
        partial = self.page.with_name(f".partial-{self.page.name}")
        partial.write_text("\n".join(page.lines(content)) + "\n", encoding="utf-8")
        partial.replace(self.page)
