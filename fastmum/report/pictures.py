"""Reconstructions over time, inside the page."""

from __future__ import annotations

import html

import numpy as np

from fastmum.report.document import embed
from fastmum.report.run import Run

MOST = 24  # pictures of a page, from the first to the last


def reconstructions(run: Run) -> str:
    """A picture with a slider through those of a run; empty where it has none that can be read."""
    steps = list(run.pictures)
    picked = np.unique(np.linspace(0, len(steps) - 1, min(MOST, len(steps))).round().astype(int)) if steps else []
    shown = [(steps[i], embedded) for i in picked if (embedded := embed(run.pictures[steps[i]]))]
    if not shown:
        return ""
    last_step, last = shown[-1]
    sources = "".join(f'<img data-step="{step}" src="{source}" alt="" loading="lazy">' for step, source in shown)
    slider = (
        f'<div class="slider"><input type="range" min="0" max="{len(shown) - 1}" value="{len(shown) - 1}" '
        f'aria-label="step of the reconstruction"><output>step {last_step:,}</output></div>'
        f'<div class="strip">{sources}</div>'
    )
    title = f"Reconstructions: {run.label}"
    return (
        '<figure class="pictures"><figcaption><h3>' + html.escape(title) + "</h3>"
        '<p class="note">of held-out sequences, where there are any: original, what the encoder saw, prediction</p>'
        f'</figcaption><div class="stage"><img src="{last}" alt="reconstruction after {last_step:,} steps"></div>'
        f"{slider if len(shown) > 1 else ''}</figure>"
    )
