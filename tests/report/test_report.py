"""The page about runs: what it shows, that it is one valid file, and errors for the user."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import check_in_print, check_on_a_phone
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmum.report.__main__ import main
from fastmum.report.charts import Chart, Line, report_charts, thin
from fastmum.report.page import MAX_PICTURES, number, report_page
from fastmum.report.run import distinct_labels, read_run

VIEWS = "Loss by number of views"


class Page(HTMLParser):
    """Parses a page; fails if an element is not closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.html = [], [], "", html
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def record(step, **values):
    return {"step": step, "loss": 1 / (1 + step / 50), "lr": 1e-3 * step, "grad_norm": 0.5 + step % 3, **values}


def full(step):
    more = {"held_out_loss": 0.7, "held_out_loss_ema": 0.6} if step % 20 == 0 else {}
    more |= {f"loss/views_{S}": 0.5 + S / 100 + 1 / step for S in (1, 2, 3, 10)}
    more |= {"skipped_steps": int(step >= 30) * 2, "bad_frames": step // 10, "bad_frames/co3d": step // 10}
    more |= {"gpu_hours": step / 10, "gpu_hours_projected": 12.5, "frames_per_s": 100.0 + step % 7, "mfu": 0.431}
    return record(step, memory_gb=0.1, data_wait=0.1, checkpoint_stall_s=0.1, **more)


def make_run(root, records, name="mine", pictures=(), tail=""):
    root.mkdir(parents=True, exist_ok=True)
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records) + tail)
    (root / "config.yaml").write_text(f"run:\n  name: {json.dumps(name)}\ntrain:\n  steps: 100\n")
    for step in pictures:
        (root / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), (step % 256, 0, 0)).save(root / f"pictures/step_{step:07d}.png")
    return root


def shown(*roots):
    return Page(report_page(distinct_labels([read_run(root) for root in roots])))


def lines_of(root):
    return {chart.title: {line.label: line.points for line in chart.lines} for chart in report_charts([read_run(root)])}


def drawing(values, label="y", **options):
    """The parsed SVG of a line, after checks that it is valid and contains finite numbers only."""
    text = Chart("t", [Line("a", values, "var(--series-1)", dots=True)], label, **options).svg()
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', text)
    assert "#fff" not in text  # placeholders of colours
    return ElementTree.fromstring(text)


def test_a_complete_run(tmp_path):
    root = make_run(tmp_path / "run", [full(step) for step in range(2, 101, 2)], pictures=(20, 40, 100))
    (root / "checkpoints/step_0000100").mkdir(parents=True)
    (root / "checkpoints/step_0000100/0.distcp").write_bytes(b"x" * 2_500_000)
    (root / "checkpoints/step_0000050.pt").write_bytes(b"x" * 1_000_000)
    (root / "checkpoints/step_0000060.partial-1").mkdir()
    (root / "checkpoints/step_0000007.pt").symlink_to(tmp_path / "deleted")
    (root / "bad_frames.log").write_text("co3d\t/data/a.jpg\ttruncated\n")
    page = shown(root)
    for expected in (
        "of 100 steps (100%), finished", "0.700", "43.1 % MFU", "10 so far, 12.5 projected",
        "4,608 (64 × A100 × 3 days)", "2,304 (32 × A100 × 3 days)", "Table 12", "2.5 MB", "step_0000050.pt",
        "/data/a.jpg", 'name: "mine"', "29 to 30", "best 0.700 at step 20",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert not re.search("partial-1|0000007", page.html)
    lines = lines_of(root)
    assert list(lines) == [
        "Loss", VIEWS, "Loss against number of views", "Learning rate", "Gradient norm",
        "Throughput", "Throughput by time", "Model FLOP utilisation", "Waiting for data", "Memory",
        "Waiting for checkpoints", "Skipped steps and bad frames",
    ]  # fmt: skip
    assert [page.tags.count(tag) for tag in ("svg", "img")] == [12, 1 + 3]
    assert lines["Loss"]["training"] == [(step, 1 / (1 + step / 50)) for step in range(2, 101, 2)]
    assert lines["Loss"]["held out"] == [(step, 0.7) for step in range(20, 101, 20)]
    assert lines["Loss"]["held out, EMA"] == [(step, 0.6) for step in range(20, 101, 20)]
    late = sum(1 / step for step in range(90, 101, 2)) / 6
    assert lines["Loss against number of views"]["mine"] == [
        (S, pytest.approx(0.5 + S / 100 + late)) for S in (1, 2, 3, 10)
    ]
    assert list(lines[VIEWS]) == ["single images", "2 views", "3 views", "10 views"]
    assert lines["Throughput by time"]["mine"][0] == (0.2, 102)
    # No other file, no network; ids are unique.
    assert not re.search(r'\s(src|href|srcset|data)="(?!data:image/jpeg;base64,|#)', page.html)
    urls = set(re.findall(r"https?://[^\s\"')]+|@import|\bfetch\(|XMLHttpRequest", page.html))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    ids = re.findall(r' id="([^"]*)"', page.html)
    assert len(ids) == len(set(ids))


def test_numbers_of_views_are_grouped(tmp_path):
    records = [record(s, **{f"loss/views_{S}": float(S) for S in range(1, 25) if (S + s) % 3}) for s in range(1, 30)]
    lines = lines_of(make_run(tmp_path / "run", records))[VIEWS]
    groups = ["2 to 5", "6 to 9", "10 to 12", "13 to 15", "16 to 18", "19 to 21", "22 to 24"]
    assert list(lines) == ["single images", *(f"{group} views" for group in groups)]
    assert lines["2 to 5 views"][0] == (1, 3.5)  # of 3 and 4; that step has no 2 and 5 views
    assert lines["22 to 24 views"][1] == (2, 23.5)


@settings(deadline=None)
@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=200), st.integers(1, 50))
def test_thinned_points_are_means_of_all(values, most):
    rows = thin(list(enumerate(values)), most)
    assert len(rows) <= most
    assert rows[-1, 0] == len(values) - 1
    assert (rows[:, 2].min(), rows[:, 3].max()) == (min(values), max(values))
    assert (rows[:, 2] - 1e-3 <= rows[:, 1]).all()
    assert (rows[:, 1] <= rows[:, 3] + 1e-3).all()


def test_any_numbers_and_a_spike_in_a_long_run_can_be_drawn():
    svg = drawing([*((float(step), 1.0 + step % 2) for step in range(20_000)), (20_000.0, 9e4)])
    assert "80000" in "".join(svg.itertext())  # the axis reaches it
    assert len(ElementTree.tostring(svg)) < 100_000
    for values in ([0.0, 0.0], [-1.0, 2.0], [1e-30, 1e30], [5.0], [1e300, -1e300]):
        for options in ({}, {"log": True}, {"from_zero": True, "counts": True}, {"settling": 0.05}):
            assert drawing(list(enumerate(values)), **options) is not None


def test_axes():
    def ticks(scale=1.0, shift=0.0, **options):
        svg = drawing([(x, scale * y + shift) for x, y in ((0.0, 90.0), (50.0, 2.0), (100.0, 3.0))], **options)
        texts = [text.strip() for text in svg.itertext() if text.strip()]
        return texts[texts.index("step") + 1 : texts.index("y")]

    assert ticks() == ["0", "20", "40", "60", "80"]
    assert ticks(settling=0.1) == ["2.00", "2.25", "2.50", "2.75", "3.00"]
    assert [ticks(shift=900.0, from_zero=zero)[0] for zero in (False, True)] == ["900", "0"]
    assert ticks(scale=-1.0, from_zero=True)[0] == "−80"
    assert ticks(scale=0.01, percent=True)[-1] == "80%"
    assert ticks(log=True) == ["2", "5", "10", "20", "50", "100"]
    assert ticks(scale=0.0, counts=True, from_zero=True) == ["0", "1"]


def test_several_runs_over_each_other(tmp_path):
    a = make_run(tmp_path / "a", [full(step) for step in range(2, 50, 2)], name="first", pictures=(2,))
    b = make_run(tmp_path / "b", [full(step) for step in range(2, 30, 2)], name="second")
    c = make_run(tmp_path / "c", [record(2), record(4)], name="second")
    page = shown(a, b, c)
    assert "first, held out" in page.text
    assert f"Configuration of {c}" in page.text
    lines = {chart.title: chart.lines for chart in report_charts(distinct_labels([read_run(x) for x in (a, b, c)]))}
    assert VIEWS not in lines
    assert [line.label for line in lines["Learning rate"]] == ["first", str(b), str(c)]
    assert sum(color in page.html for color in {line.color for line in lines["Learning rate"]}) == 3
    assert lines["Throughput"][2].points == []


def test_names_and_files_cannot_become_markup(tmp_path):
    evil = "</script><script>alert(1)</script><!--<b>&\"'"
    root = make_run(tmp_path / "run", [record(1, bad_frames=1, **{f"bad_frames/{evil}": 1})], name=evil)
    (root / "bad_frames.log").write_text(f"{evil}\tfile{evil}\treason\n")
    other = make_run(tmp_path / "other", [record(1), record(2)], name="other")
    for roots in ((root,), (root, other)):
        page = shown(*roots)
        assert page.tags.count("script") == 1
        assert "<script>alert" not in page.html
        assert evil in page.text


def test_a_run_in_progress_without_finite_values_or_configuration(tmp_path):
    for tail in ("", '{"step": 9, "lo', "\x00\x00", "{}"):
        page = shown(make_run(tmp_path / "run", [record(1), record(2)], tail=tail))
        assert "of 100 steps (2%), not finished" in page.text
        assert "not evaluated yet" in page.text
        assert '<figure class="pictures"' not in page.html
    tail = '{"step": 3, "loss": NaN, "lr": Infinity}\n'
    root = make_run(tmp_path / "run", [record(1, mfu=None), record(2)], tail=tail)
    (root / "config.yaml").unlink()
    assert "There is no config.yaml" in shown(root).text
    run = read_run(root)
    assert (run.step, run.series("lr"), run.series("mfu")) == (3, [(1, 1e-3), (2, 2e-3)], [])


def test_pictures_are_few_and_small(tmp_path):
    root = make_run(tmp_path / "run", [record(1)], pictures=range(1, 60))
    Image.new("RGB", (2000, 3000)).save(root / "pictures/step_0000060.png")
    page = shown(root)
    steps = [int(step) for step in re.findall(r'alt="step (\d+)"', page.html)]
    assert (len(steps), steps[0], steps[-1]) == (MAX_PICTURES, 1, 60)
    pictures = map(base64.b64decode, re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page.html))
    assert max(max(Image.open(io.BytesIO(picture)).size) for picture in pictures) == 1280
    (root / "pictures/step_0000060.png").write_bytes(b"cut")
    assert 'alt="step 60"' not in shown(root).html


def test_numbers():
    texts = {0: "0", 12345.6: "12,346", 0.08123: "0.0812", 0.5: "0.500", 2.0: "2", 1.5e6: "1.5M", 2.2e9: "2.2G",
             3e-5: "3e-05", -0.25: "-0.250", 12.34: "12.3", None: "–"}  # fmt: skip
    assert {value: number(value) for value in texts} == texts
    assert number(0.4312, percent=True) == "43.1 %"


def test_the_command(tmp_path):
    root, page = make_run(tmp_path / "run", [full(2), full(4)]), tmp_path / "page.html"
    assert main([str(root)]) == 0
    code = """if True:
        import sys
        from fastmum.report.__main__ import main
        print("matplotlib" in sys.modules)
        main(sys.argv[1:])
        print("torch" in sys.modules, "matplotlib.pyplot" in sys.modules)"""
    words = [sys.executable, "-c", code, str(root), "--out", str(page)]
    first, written, last = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert (first, last) == ("False", "False False")
    assert written.startswith(str(page))
    assert all(file.read_text().startswith("<!doctype html>") for file in (page, root / "report.html"))


def test_errors_are_one_line(tmp_path, capsys):
    none, empty = tmp_path / "none", tmp_path / "empty"
    empty.mkdir()
    begun, run = make_run(tmp_path / "begun", [{"loss": 1.0}]), make_run(tmp_path / "run", [record(1)])
    unreadable = make_run(tmp_path / "unreadable", [record(1)])
    (unreadable / "config.yaml").unlink()
    (unreadable / "config.yaml").symlink_to("/proc/self/mem")  # reading fails for every user
    for words, named in (
        ([none], none), ([run, empty], empty), ([begun], begun / "metrics.jsonl"), ([unreadable], unreadable),
        ([run, "--out", none / "page.html"], none / "page.html"),
    ):  # fmt: skip
        assert main([str(word) for word in words]) == 2
        assert re.fullmatch(f"error: .*'{re.escape(str(named))}'.*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_on_a_phone_and_in_print(tmp_path):
    records = [full(step) | {"gpu_hours": 20.0 * step, "gpu_hours_projected": 3000.0} for step in range(2, 101, 2)]
    runs = [make_run(tmp_path / name, records, name * 30, (20, 100)) for name in ("a", "b")]
    for run in runs:
        (run / "bad_frames.log").write_text("co3d\t/data/" + "folder/" * 40 + "\ttruncated\n")
    for roots, bars in ((runs[:1], 3), (runs, 4)):
        page = tmp_path / "page.html"
        assert main([*map(str, roots), "--out", str(page)]) == 0
        page.write_text(page.read_text().replace("<details>", "<details open>"))
        check_on_a_phone(page, bars=2 * bars)
        check_in_print(page, ["Progress", "Faults", "projected", "Reconstructions:"], (0x24, 0x67, 0xC9))


def test_figures_for_talks(tmp_path, capsys):
    root = make_run(tmp_path / "run", [record(step) for step in range(2, 101, 2)], "$a_1$", pictures=(20, 40, 100))
    Image.new("RGB", (30, 20)).save(root / "pictures/step_0000020.png")  # another size
    other = make_run(tmp_path / "other", [record(1), record(2)], name="other")
    count = 4  # loss, learning rate, gradient norm, reconstruction
    for kind in ("pdf", "png", "gif"):
        assert main([str(root), "--figures", kind]) == 0
        files = sorted((root / "figures").glob(f"*.{kind}"))
        assert len(files) == count
        assert f"{root / 'figures'} ({count} figures)" in capsys.readouterr().out
        assert {"loss.pdf", "reconstruction.pdf"} <= {file.with_suffix(".pdf").name for file in files}
        assert all(file.read_bytes().startswith((b"%PDF", b"\x89PNG", b"GIF8")) for file in files)
    with Image.open(root / "figures/reconstruction.gif") as picture:
        assert (picture.n_frames, picture.size) == (3, (60, 40))
        assert picture.info["duration"] < 1000
    with Image.open(root / "figures/loss.gif") as gif, Image.open(root / "figures/loss.png") as whole:
        lines = []
        for i in (0, gif.n_frames // 2, gif.n_frames - 1):
            gif.seek(i)
            blue = np.abs(np.asarray(gif.convert("RGB")).astype(int) - (0x24, 0x67, 0xC9)).max(-1) < 40
            lines.append(blue[:, blue.shape[1] // 5 :].any(0).sum())  # columns with a part of the first line
        assert gif.size == whole.size
    assert lines[0] < 0.1 * lines[2]
    assert 0.3 < lines[1] / lines[2] < 0.7
    assert main([str(root), str(other), "--figures", "png", "--out", str(tmp_path / "both/page.html")]) == 2
    (tmp_path / "both").mkdir()
    assert main([str(root), str(other), "--figures", "png", "--out", str(tmp_path / "both/page.html")]) == 0
    assert (tmp_path / "both/figures/reconstruction_1.png").is_file()


def test_damaged_files_of_a_run(tmp_path, refusal):
    """Every page is written, or one line names the run."""
    lines = ["[1]", "7", '"text"', '{"step": true}', '{"step": 1' + "0" * 400 + "}", '{"step": 4, "loss": 1e999}']
    lines += ['{"step": 5, "loss/views_²": 1, "loss/views_x": 1, "loss/views_0": 1, "loss": 1' + "0" * 400 + "}"]
    root = make_run(tmp_path / b"run \xe4".decode(errors="surrogateescape"), [record(1), record(2)], pictures=(1, 2))
    with open(root / "metrics.jsonl", "a") as file:
        file.write("\n".join(lines) + "\n" + json.dumps(record(6)) + "\n")
    assert read_run(root).step == 6
    (root / "pictures/step_0000001.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xff" * 40)
    os.mkfifo(root / "pictures/step_0000003.png")
    for config in ("[" * 5000, "run: {name: [1]}\ntrain: {steps: .inf}", "a: !!int ''", "\0", "2001-99-99", "&a [*a]"):
        (root / "config.yaml").write_text(config)
        assert read_run(root).steps is None
    assert main([str(root), "--figures", "png"]) == 0
    assert "~nobody-of-that-name" in refusal(main, "~nobody-of-that-name/run")
    (root / "metrics.jsonl").unlink()
    os.mkfifo(root / "metrics.jsonl")
    assert "metrics.jsonl" in refusal(main, root)
