import base64
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fastmum.report.__main__ import main
from fastmum.report.document import MAX_SIDE
from fastmum.report.page import page
from fastmum.report.pictures import MOST
from fastmum.report.run import ReportError, read_run, with_labels

CONFIG = "run:\n  name: {name}\ntrain:\n  steps: {steps}\n"
VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Reads a page as a browser would: what it shows, what it loads, whether its elements are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.texts, self.scripts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.sources += [attrs[name] for name in ("src", "href", "srcset", "data") if name in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts).append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def record(step, **values):
    return {"step": step, "loss": 1 / (1 + step / 50), "lr": 1e-3 * step, "grad_norm": 0.5 + step % 3, **values}


def full(step):
    views = {f"loss/views_{S}": 0.5 + S / 100 + 1 / step for S in (1, 2, 3, 10)}
    more = {"held_out_loss": 0.7} if step % 20 == 0 else {}
    return record(
        step,
        frames_per_s=100.0 + step % 7,
        tokens_per_s=6400.0,
        tflops=1.5,
        mfu=0.431,
        data_wait=0.01,
        memory_gb=3.0,
        skipped_steps=int(step >= 30) * 2,
        bad_frames=step // 10,
        gpu_hours=step / 10,
        gpu_hours_projected=12.5,
        checkpoint_stall_s=0.004,
        **{"bad_frames/co3d": step // 10},
        **views,
        **more,
    )


def make_run(root, records, name="mine", steps=100, pictures=(), tail=""):
    root.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(line) + "\n" for line in records)
    (root / "metrics.jsonl").write_text(lines + tail)
    (root / "config.yaml").write_text(CONFIG.format(name=json.dumps(name), steps=steps))
    for step in pictures:
        (root / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), (step % 256, 0, 0)).save(root / f"pictures/step_{step:07d}.png")
    return root


def shown(*roots):
    text = page(with_labels([read_run(root) for root in roots]))
    return Page(text), text


def titles(text):
    return re.findall(r'<figure class="chart"><figcaption><h3>([^<]*)</h3>', text)


def numbers(text):
    return {
        title: json.loads(data)
        for title, data in re.findall(
            r'<figure class="chart"><figcaption><h3>([^<]*)</h3>.*?<script type="application/json">(.*?)</script>', text
        )
    }


def test_a_whole_run(tmp_path):
    root = make_run(tmp_path / "run", [full(step) for step in range(2, 101, 2)], pictures=(20, 40, 100))
    (root / "checkpoints/step_0000100").mkdir(parents=True)
    (root / "checkpoints/step_0000100/0.distcp").write_bytes(b"x" * 2_500_000)
    (root / "checkpoints/step_0000050.pt").write_bytes(b"x" * 1_000_000)
    (root / "checkpoints/step_0000060.partial-1").mkdir()
    (root / "bad_frames.log").write_text("co3d\t/data/a.jpg\ttruncated\n")
    read, text = shown(root)
    for expected in (
        "finished", "100", "of 100 steps", "0.700", "43.1 % MFU", "10 so far, 12.5 projected",
        "4,608 (64 × A100 × 3 days)", "2,304 (32 × A100 × 3 days)", "Table 12", "2.5 MB", "step_0000050.pt",
        "/data/a.jpg", "name: \"mine\"", "29 to 30",
    ):  # fmt: skip
        assert expected in read.text, expected
    assert "partial-1" not in text
    assert titles(text) == [
        "Loss", "Loss by number of views", "Loss against number of views", "Learning rate", "Gradient norm",
        "Throughput", "Throughput by time", "Model FLOP utilisation", "Waiting for data", "Memory",
        "Waiting for checkpoints", "Skipped steps and bad frames",
    ]  # fmt: skip
    assert text.count("<img data-step") == 3


def test_it_needs_nothing_but_itself(tmp_path):
    root = make_run(tmp_path / "run", [full(step) for step in range(2, 50, 2)], pictures=(20, 40))
    read, text = shown(root)
    assert read.sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in read.sources)
    loaded = re.findall(r"https?://[^\s\"')]+|@import|url\([^)]*\)|\bfetch\(|XMLHttpRequest", text)
    assert set(loaded) <= {"http://www.w3.org/2000/svg", "url(#plane)"}
    assert not {"link", "iframe", "object", "embed"} & set(read.tags)


def test_the_drawings_are_whole(tmp_path):
    root = make_run(tmp_path / "run", [full(step) for step in range(2, 50, 2)])
    _, text = shown(root)
    drawings = re.findall(r"<svg.*?</svg>", text)
    assert len(drawings) == 13
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing
        assert "inf" not in drawing


def test_curves_hold_the_numbers(tmp_path):
    root = make_run(tmp_path / "run", [full(step) for step in range(2, 51, 2)])
    data = numbers(shown(root)[1])
    lines = {line["label"]: line["points"] for line in data["Loss"]["lines"]}
    assert lines["training"] == [[step, pytest.approx(1 / (1 + step / 50), rel=1e-4)] for step in range(2, 51, 2)]
    assert lines["held out"] == [[20, 0.7], [40, 0.7]]
    profile = data["Loss against number of views"]["lines"][0]["points"]
    late = sum(1 / step for step in (46, 48, 50)) / 3
    assert profile == [[S, pytest.approx(0.5 + S / 100 + late, rel=1e-4)] for S in (1, 2, 3, 10)]
    views = [line["label"] for line in data["Loss by number of views"]["lines"]]
    assert views == ["single images", "2 views", "3 views", "10 views"]
    assert data["Throughput by time"]["lines"][0]["points"][0] == [0.2, 102]


def test_many_views_are_grouped(tmp_path):
    def line(step):
        return record(step, **{f"loss/views_{S}": float(S) for S in range(1, 25) if (S + step) % 3})

    data = numbers(shown(make_run(tmp_path / "run", [line(step) for step in range(1, 30)]))[1])
    lines = {line["label"]: line["points"] for line in data["Loss by number of views"]["lines"]}
    assert list(lines) == ["single images", *(f"{a} to {b} views" for a, b in [
        (2, 4), (5, 8), (9, 11), (12, 14), (15, 17), (18, 21), (22, 24)])]  # fmt: skip
    assert lines["2 to 4 views"][0] == [1, 3.5]  # of 3 and 4: there were no 2 views in that step


def test_long_runs_are_thinned_and_no_spike_is_hidden(tmp_path):
    records = [record(step) for step in range(1, 20_001)]
    records[7_000]["grad_norm"] = 900.0
    _, text = shown(make_run(tmp_path / "run", records, steps=20_000))
    data = numbers(text)["Gradient norm"]
    assert len(data["lines"][0]["points"]) <= 500
    assert data["lines"][0]["points"][-1][0] == 20_000
    assert data["y"][1] > 900  # the band reaches as far
    assert len(text) < 500_000


def test_several_runs_over_each_other(tmp_path):
    a = make_run(tmp_path / "a", [full(step) for step in range(2, 50, 2)], name="first")
    b = make_run(tmp_path / "b", [full(step) for step in range(2, 30, 2)], name="second")
    c = make_run(tmp_path / "c", [record(step) for step in range(2, 30, 2)], name="second")
    read, text = shown(a, b, c)
    labels = ["first", str(b), str(c)]
    assert [line["label"] for line in numbers(text)["Learning rate"]["lines"]] == labels
    assert [line["label"] for line in numbers(text)["Throughput"]["lines"]] == labels[:2]
    assert "first, held out" in text
    assert f"Configuration of {c}" in read.text
    assert len({line["color"] for line in numbers(text)["Learning rate"]["lines"]}) == 3


def test_names_and_files_cannot_become_markup(tmp_path):
    evil = "</script><script>alert(1)</script><!--<b>&\"'"
    root = make_run(tmp_path / "run", [record(1, bad_frames=1, **{f"bad_frames/{evil}": 1})], name=evil)
    (root / "bad_frames.log").write_text(f"{evil}\tfile{evil}\treason\n")
    other = make_run(tmp_path / "other", [record(1), record(2)], name="other")
    for roots in ((root,), (root, other)):
        read, text = shown(*roots)
        assert read.tags.count("script") == len(titles(text)) + 1
        assert "<script>alert" not in text
        assert "<!--" not in text
        assert evil in read.text
        for data in numbers(text).values():
            assert data["lines"]


@pytest.mark.parametrize("tail", ["", '{"step": 9, "lo', "\x00\x00", "{}"])
def test_a_run_that_goes_on(tmp_path, tail):
    root = make_run(tmp_path / "run", [record(1), record(2)], tail=tail)
    read, text = shown(root)
    assert "not finished" in read.text
    assert "of 100 steps" in read.text
    assert "not evaluated yet" in read.text
    assert '<figure class="pictures"' not in text


def test_the_first_line_alone_and_no_configuration(tmp_path):
    root = make_run(tmp_path / "run", [{"step": 5, "loss": None, "mfu": None}])
    (root / "config.yaml").unlink()
    read, _ = shown(root)
    assert "There is no config.yaml" in read.text


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [-1.0, 2.0], [1e-30, 1e30], [5.0], [7.0, 7.0], [None, 1.0], [1e300, -1e300]]
)
def test_any_numbers_can_be_drawn(tmp_path, values):
    names = (
        "loss",
        "held_out_loss",
        "grad_norm",
        "lr",
        "frames_per_s",
        "mfu",
        "skipped_steps",
        "gpu_hours",
        "loss/views_2",
    )
    records = [{"step": i + 1} | dict.fromkeys(names, value) for i, value in enumerate(values)]
    _, text = shown(make_run(tmp_path / "run", records))
    for drawing in re.findall(r"<svg.*?</svg>", text):
        found = re.findall(r'(?:[xy][12]?|c[xy]|d)="([^"]*)"', drawing)
        assert all(
            math.isfinite(float(n)) for part in found for n in re.findall(r"-?[\d.]+(?:e[+-]?\d+)?|nan|inf", part)
        )


def test_pictures_are_few_and_small(tmp_path):
    root = make_run(tmp_path / "run", [record(1)], pictures=range(1, 60))
    Image.fromarray(np.zeros((3000, 2000, 3), np.uint8)).save(root / "pictures/step_0000060.png")
    (root / "pictures/step_0000061.png").write_bytes(b"cut")
    read, text = shown(root)
    steps = [int(step) for step in re.findall(r'<img data-step="(\d+)"', text)]
    assert len(steps) in (MOST - 1, MOST)
    assert steps[0] == 1
    assert 61 not in steps
    assert len(text) < 1_500_000
    sizes = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size for source in read.sources]
    assert max(max(size) for size in sizes) <= MAX_SIDE


def test_a_checkpoint_that_goes_away_meanwhile(tmp_path):
    root = make_run(tmp_path / "run", [record(1)])
    (root / "checkpoints").mkdir()
    (root / "checkpoints/step_0000007.pt").symlink_to(tmp_path / "gone")
    assert read_run(root).checkpoints == []


def test_numbers_that_are_none_are_no_points(tmp_path):
    root = make_run(
        tmp_path / "run", [record(1, mfu=None), record(2)], tail='{"step": 3, "loss": NaN, "lr": Infinity}\n'
    )
    run = read_run(root)
    assert run.step == 3
    assert [step for step, _ in run.series("loss")] == [1, 2]
    assert run.series("lr") == [(1, 1e-3), (2, 2e-3)]
    assert run.series("mfu") == []


def test_the_command(tmp_path, capsys):
    root = make_run(tmp_path / "run", [full(2), full(4)])
    assert main([str(root)]) == 0
    assert (root / "report.html").read_text().startswith("<!doctype html>")
    assert str(root / "report.html") in capsys.readouterr().out
    assert main([str(root), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").exists()
    assert not list(tmp_path.rglob("partial_*"))


def test_what_cannot_be_reported_on_is_one_line(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    begun = make_run(tmp_path / "begun", [])
    run = make_run(tmp_path / "run", [record(1)])
    nowhere = tmp_path / "no/page.html"
    unreadable = make_run(tmp_path / "unreadable", [record(1)]) / "config.yaml"
    unreadable.unlink()
    unreadable.symlink_to("/proc/self/mem")  # reading it fails for every user
    for arguments, message in (
        ([tmp_path / "none"], f"there is no run '{tmp_path / 'none'}'"),
        ([run, empty], f"'{empty}' is no run: it has no metrics.jsonl"),
        ([begun], f"'{begun / 'metrics.jsonl'}' has no line yet; the first comes after train.log_every steps"),
        ([unreadable.parent], f"'{unreadable.parent}' cannot be read (Input/output error)"),
        ([run, "--out", nowhere], f"'{nowhere}' cannot be written (No such file or directory)"),
    ):  # fmt: skip
        assert main([str(word) for word in arguments]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_it_starts_without_torch(tmp_path):
    root = make_run(tmp_path / "run", [record(1)])
    code = "import sys; from fastmum.report.__main__ import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"
    shown_help = subprocess.run(
        [sys.executable, "-m", "fastmum.report", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert "RUN" in shown_help.stdout


# Linear RGB as people without red, green or blue cones see it (Machado et al. 2009, severity 1).
VISION = {
    "all": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
LMS = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
       [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
       [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_are_told_apart_by_everyone(vision, mode):
    css = resources.files("fastmum.report").joinpath("page.css").read_text()
    block = css.partition("@media (prefers-color-scheme: dark)")[2 * mode]

    def rgb(name):
        code = re.search(rf"--{name}: #(\w\w)(\w\w)(\w\w);", block)
        c = np.array([int(part, 16) / 255 for part in code.groups()])
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)

    def seen(name):  # Oklab
        return LAB @ np.cbrt(LMS @ np.clip(VISION[vision] @ rgb(name), 0, 1))

    def light(name):
        return rgb(name) @ [0.2126, 0.7152, 0.0722] + 0.05

    names = [f"series-{n}" for n in range(1, 7)]
    for i, name in enumerate(names):
        assert max(light(name), light("surface")) / min(light(name), light("surface")) >= 3  # WCAG 2.2, 1.4.11
        for other in names[:i]:
            assert np.linalg.norm(seen(name) - seen(other)) > 0.1, (name, other)


def test_a_record_without_a_step_is_passed_over(tmp_path):
    root = make_run(tmp_path / "run", [{"loss": 1.0}])
    with pytest.raises(ReportError):
        read_run(root)
