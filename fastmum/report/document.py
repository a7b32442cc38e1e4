"""What pages of fastmum have in common: one file with style, script and everything else inside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from PIL import Image

from fastmum.report.chart import PLANE

MAX_SIDE = 1280  # pixels of a picture
QUALITY = 85  # of JPEG


def document(title: str, body: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML, from the header on; a footer with the time is added.
    """
    footer = f"<footer>written by fastmum, {date(datetime.now(UTC))}</footer>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_file('page.css')}</style></head>"
        f"<body>{PLANE}<main>{''.join(body)}{footer}</main><script>{_file('page.js')}</script></body></html>\n"
    )


def date(time: datetime) -> str:
    """A time for people."""
    return f"{time:%Y-%m-%d %H:%M} UTC"


def table(names: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def embed(path: Path, max_side: int = MAX_SIDE) -> str | None:
    """A picture as a data URL, downscaled to a side; None for a file that is no picture (yet)."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except OSError:
        return None
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _file(name: str) -> str:
    return resources.files("fastmum.report").joinpath(name).read_text(encoding="utf-8")
