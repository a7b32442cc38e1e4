"""The masked loss with more and more views: choice of the views, and equality with the model's own losses."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmum.data.errors import DataError
from fastmum.evaluate import SequenceSet, ViewSequence, ViewSettings, evaluate_views, open_sequences
from fastmum.evaluate.__main__ import main
from fastmum.evaluate.pictures import draw_views
from fastmum.evaluate.records import read
from fastmum.evaluate.views import target_batch, targets
from fastmum.model.encoder import Encoder


@pytest.fixture
def noisy(tmp_path):
    """Three sequences of unlike length, every picture a random one of 32 x 40 pixels."""
    rng = np.random.default_rng(0)
    for name, count in (("a", 9), ("b/images", 12), ("c", 3)):
        folder = tmp_path / "scenes" / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "scenes"


def test_neighbours_are_the_nearest():
    views = [ViewSequence(name, [None] * count) for name, count in (("a", 9), ("b", 12))]
    found = targets(SequenceSet("two", views, 32), ViewSettings(counts=(1, 4), stride=4))
    assert [(t.sequence, t.frame) for t in found] == [(0, 0), (0, 4), (0, 8), (1, 0), (1, 4), (1, 8)]
    assert (found[0].near, found[0].far) == ([1, 2, 3], [0, 1, 2])
    assert (found[1].near, found[1].far) == ([5, 3, 6], [4, 5, 3])
    assert (found[2].near, found[2].far) == ([7, 6, 5], [8, 9, 7])
    assert (found[5].near, found[5].far) == ([9, 7, 10], [8, 7, 6])  # the other sequence ends there
    assert [t.other for t in found] == 3 * [1] + 3 * [0]
    found = targets(SequenceSet("two", [views[0]] * 2, 32), ViewSettings(counts=(1, 3), gap=2, stride=3))
    assert [(t.frame, t.near) for t in found[:3]] == [(0, [2, 4]), (3, [5, 1]), (6, [8, 4])]


def test_the_batch_of_a_target_and_its_picture(noisy, tiny):
    sequences = open_sequences(str(noisy), 8)
    assert [views.name for views in sequences.sequences] == ["a", "b/images"]  # c is too short
    settings = ViewSettings()
    target = targets(sequences, settings)[1]
    batch = target_batch(sequences, target, settings, 64, 16)
    assert batch.lengths == [1, 2, 4, 8, 2, 4, 8]
    assert batch.firsts.tolist() == [0, 1, 3, 7, 15, 17, 21]
    for stack in (batch.frames, batch.noise):  # the same frame under the same mask, wherever it stands
        assert (stack[batch.firsts] == stack[0]).all()
        assert torch.equal(stack[3:7], stack[7:11])
        assert torch.equal(stack[17:21], stack[21:25])
        assert len(stack.flatten(1).unique(dim=0)) == 8 + 7
    again = target_batch(sequences, target, settings, 64, 16, mask=1)
    assert torch.equal(again.frames, batch.frames)
    assert not (again.noise == batch.noise).any(dim=1).all()
    picture = draw_views(tiny.eval(), batch, 0.5)
    assert picture.size == (7 * 260 - 4, 18 + 256)  # target, seen, 1, 2, 4 and 8 views, 8 unrelated
    shown = np.asarray(picture.crop((0, 18, 256, 274)).resize((64, 64), Image.Resampling.BOX)).astype(int)
    assert abs(shown - batch.frames[0].numpy()).mean() < 20  # noise rings when it is enlarged; any other frame: 85


def test_numbers_are_the_models_losses(noisy, tiny):
    sequences = open_sequences(str(noisy), 4)
    settings = ViewSettings(counts=(1, 2, 4), mask_ratio=0.5, masks=2)
    result = evaluate_views(tiny.eval(), sequences, settings, 64)
    expected = {}
    for target in targets(sequences, settings):
        for mask in range(2):
            batch = target_batch(sequences, target, settings, 64, 16, mask)
            rows = []
            for frames, noise in zip(batch.frames.split(batch.lengths), batch.noise.split(batch.lengths), strict=True):
                with torch.no_grad():  # each sequence by itself
                    rows.append(tiny(frames, [len(frames)], 0.5, noise, reduction="none").loss[0].item())
            expected.setdefault(target.sequence, []).append(rows)
    means = np.array([np.mean(rows, axis=0) for rows in expected.values()])
    numbers = result.numbers
    assert numbers["same"] == pytest.approx(means[:, :3].mean(0).tolist(), rel=1e-5)
    assert numbers["other"] == pytest.approx(means[:, [0, 3, 4]].mean(0).tolist(), rel=1e-5)
    assert numbers["scores"] == dict(zip(("views_1", "views_2", "views_4"), numbers["same"], strict=True))
    change = means[:, 1] - means[:, 0]
    assert numbers["change_same"][1] == pytest.approx([change.mean(), change.std(ddof=1) / 2**0.5], abs=1e-6)
    assert numbers["change_same"][0] == [0, 0]
    assert numbers["settings"]["targets"] == len(targets(sequences, settings)) == 3 + 3


def test_the_command(noisy, tmp_path, monkeypatch, capsys):
    measured, drawn, out = [], [], tmp_path / "out"
    for module, noted in (("views", measured), ("commands", drawn)):
        monkeypatch.setattr(
            f"fastmum.evaluate.{module}.target_batch",
            lambda sequences, target, *rest, n=noted: n.append(target) or target_batch(sequences, target, *rest),
        )
    words = f"views --weights random:mum_tiny --data {noisy} --out {out} --size 32 --device cpu --views 1 2 4"
    assert main([*words.split(), "--masks", "1", "--max-pairs", "3", "--pictures", "2"]) == 0
    assert (len(measured), drawn) == (3, [measured[0], measured[-1]])
    (record,) = read(out)
    assert record.content["set"] == "scenes (folder)"  # not the embedded ones
    assert record.content["views"] == [1, 2, 4]
    text = capsys.readouterr().out
    assert "loss, 1 view ↓ | loss, 2 views ↓ | loss, 4 views ↓" in text
    assert f"{record.content['scores']['views_4']:.3f}" in text
    page = (out / "report.html").read_text()
    assert "Masked loss by number of views" in page
    assert page.count("data:image/jpeg;base64,") == 2


def test_pictures_losses_and_models_that_cannot_be_used(noisy, tiny):
    sequences, settings = open_sequences(str(noisy), 4), ViewSettings(counts=(1, 2), mask_ratio=0.5)
    numbers = evaluate_views(tiny.eval(), sequences, settings, 64, most=1).numbers
    assert numbers["change_same"][1][1] is None  # one sequence has no standard error
    with torch.no_grad():
        tiny.decoder_pred.bias[0] = float("nan")
    for wrong, message in ((tiny, "not finite"), (Encoder(tiny.config), "decoder")):
        with pytest.raises(DataError, match=message):
            evaluate_views(wrong, sequences, settings, 64, most=1)
    (noisy / "a/0.png").write_bytes(b"no picture")  # pictures are read again
    with pytest.raises(DataError, match=r"a/0.png'"):
        evaluate_views(tiny.eval(), sequences, settings, 64, most=1)
