"""Progress bars, on a terminal and in a log."""

import io
import logging
import sys

import pytest
from tqdm.contrib.logging import logging_redirect_tqdm

from fastmum import progress


@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize(("terminal", "every"), [(True, 60), (False, 60), (False, 0)])
def test_a_terminal_has_a_bar_and_a_log_whole_lines(monkeypatch, terminal, every, leave):
    stderr, log = io.StringIO(), logging.Logger("log")
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "LINE_EVERY_S", every)
    log.addHandler(logging.StreamHandler(stderr))
    with logging_redirect_tqdm([log]), progress.progress_bar(range(3), desc="work", leave=leave) as bar:
        for number in bar:
            log.warning("item %d", number)
    text = stderr.getvalue()
    assert ("\r" in text) == terminal
    lines = text.replace("\r", "\n").split("\n")
    assert [line for line in lines if line.startswith("item")] == ["item 0", "item 1", "item 2"]
    shown = [line.split("|")[2].split()[0] for line in lines if line.startswith("work:")]
    if terminal:
        assert "0/3" in shown
    else:
        assert list(dict.fromkeys(shown)) == ([] if every else ["0/3", "1/3", "2/3", "3/3"])
        assert all(line.startswith(("item", "work:")) for line in lines[:-1]), text


def test_bars_report_inside_a_block_only(monkeypatch):
    monkeypatch.setattr(progress, "REPORT_EVERY_S", 0)
    calls = []
    with progress.reported(lambda: calls.append(1)):
        assert list(progress.progress_bar(range(3))) == [0, 1, 2]
        assert len(calls) >= 3
        with progress.progress_bar(total=2) as bar:
            bar.update()
        monkeypatch.setattr(progress, "REPORT_EVERY_S", 60)
        list(progress.progress_bar(range(100), show=False))
    before = len(calls)
    monkeypatch.setattr(progress, "REPORT_EVERY_S", 0)
    list(progress.progress_bar(range(3)))
    assert 4 <= len(calls) == before < 20
