"""Pages as a headless Chromium shows them: on a phone, and printed."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PHONE, LEAST_TEXT = 390, 10.0  # CSS pixels
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=5000",
]  # fmt: skip
MEASURE = """<script>addEventListener("load", () => {
  const found = {width: document.documentElement.scrollWidth, text: [], right: [], bars: [], cells: 0};
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, box = element.getBoundingClientRect();
    if (!texts.currentNode.data.trim() || !box.width || element.closest("script, style")) continue;
    const scale = element.ownerSVGElement ? Math.hypot(element.getScreenCTM().a, element.getScreenCTM().b) : 1;
    found.text.push(parseFloat(getComputedStyle(element).fontSize) * scale);
    found.right.push(box.right);
  }
  for (const bar of document.querySelectorAll(".bar i")) {
    const box = bar.getBoundingClientRect();
    found.bars.push([box.width, box.height]);
  }
  for (const cell of document.querySelectorAll("td")) {
    found.cells += cell.getBoundingClientRect().width > 0;
    found.right.push(cell.getBoundingClientRect().left + cell.scrollWidth);
  }
  parent.postMessage(found, "*");
});</script></body>"""


def check_on_a_phone(page: Path, bars: int = 0) -> None:
    """Assert that all text is legible, that nothing is cut or wider than the screen, and the number of visible bars."""
    measured, frame = page.with_name("measured.html"), page.with_name("frame.html")
    measured.write_text(page.read_text(encoding="utf-8").replace("</body>", MEASURE), encoding="utf-8")
    frame.write_text(
        "<script>onmessage = (event) => { document.body.textContent = JSON.stringify(event.data); };</script>"
        f'<body><iframe src="{measured.name}" width="{PHONE}" height="4000" style="border: 0"></iframe></body>'
    )
    text = re.search(r"<body>(\{.*\})</body>", chromium(frame, "--window-size=800,4200", "--dump-dom"), re.S)
    assert text, "the page was measured"
    found = json.loads(unescape(text[1]))
    assert min(found["text"]) >= LEAST_TEXT
    assert max(found["width"], *found["right"]) <= PHONE
    assert found["cells"] == page.read_text(encoding="utf-8").count("<td")
    assert len(found["bars"]) == bars
    assert all(width >= 2 and height >= 8 for width, height in found["bars"])


def check_in_print(page: Path, words: list[str], color: tuple[int, int, int] | None = None) -> None:
    """Assert that the printed text is legible and within the sheet, has the `words`, and that `color` is printed."""
    if not shutil.which("pdftotext"):
        pytest.skip("pdftotext and pdftoppm (Debian's poppler-utils) are not installed")
    pdf = page.with_suffix(".pdf")
    chromium(page, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    boxes = subprocess.run(["pdftotext", "-bbox", pdf, "-"], capture_output=True, text=True, check=True).stdout
    width = float(re.search(r'<page width="([\d.]+)"', boxes)[1])
    pattern = r'<word xMin="([\d.]+)" yMin="([\d.]+)" xMax="([\d.]+)" yMax="([\d.]+)">(.*?)</word>'
    found = [(*map(float, numbers), unescape(word)) for *numbers, word in re.findall(pattern, boxes)]
    assert set(words) <= {word for *_, word in found}
    assert max(right for _, _, right, _, _ in found) <= width - 20
    # The box of a word is at least as high as its font; words along the y axis are rotated.
    assert min(max(x1 - x0, y1 - y0) for x0, y0, x1, y1, word in found if len(word) > 2) >= LEAST_TEXT * 72 / 96
    if color:
        subprocess.run(["pdftoppm", "-r", "72", "-l", "1", "-singlefile", "-png", pdf, pdf.with_suffix("")], check=True)
        pixels = np.asarray(Image.open(pdf.with_suffix(".png")).convert("RGB")).astype(int)
        assert (abs(pixels - color).max(-1) < 8).sum(1).max() > 20, "a bar of that color is printed"


def chromium(page: Path, *words: str) -> str:
    """What Chromium prints for a page; skips the test where it is not installed."""
    program = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if program is None:
        pytest.skip("no Chromium is installed (Debian's package chromium)")
    profile = page.with_name("profile")
    command = [program, *FLAGS, f"--user-data-dir={profile}", *words, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
