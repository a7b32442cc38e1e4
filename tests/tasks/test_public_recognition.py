"""Numbers of CAPI's public code: probes and their training, segmentation, mIoU and top-1, as files."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from public_files import error, files
from safetensors import safe_open
from safetensors.torch import load_file

from fastmum.tasks.recognition.probes import SOURCES, Head, Probes, any_match, logits_of, schedule, sources_of
from fastmum.tasks.recognition.segment import (
    INVERSE_PENALTIES,
    Samples,
    confusion,
    knn,
    scores_of,
    select_knn,
    select_regression,
    standardiser,
)

IGNORED = (0, 255)


@pytest.mark.parametrize("file", files("capi", "probe.safetensors"))
def test_public_heads_and_their_training(file):
    tensors, config = load_file(file), json.loads(safe_open(file, "pt").metadata()["config"])
    heads = [Head(source, *sweep) for source, sweep in config["heads"]]
    own = [defaultdict(dict) for _ in range(3)]  # weights, gradients, weights after the steps; by head
    for key, value in tensors.items():
        for part, prefix in enumerate(("weights", "grad", "after_3_steps")):
            if key.startswith(f"{prefix}/head_"):
                _, head, name = key.split("/")
                own[part][int(head.removeprefix("head_"))][name] = value
    stacked, place = {}, {}
    for source in [each for each in SOURCES if any(head.source == each for head in heads)]:
        some = [i for i, head in enumerate(heads) if head.source == source]
        place |= {i: (source, k) for k, i in enumerate(some)}
        stacked[source] = {name: torch.stack([own[0][i][name] for i in some]) for name in own[0][some[0]]}
    width, classes = tensors["input/tokens_0"].shape[-1], tensors["output/logits"].shape[1]
    probes = Probes(heads, {}, classes, config["batch_for_lr"], weights=stacked)
    factors = schedule(config["n_iters"], config["warmup"])
    assert np.allclose(factors, tensors["schedule"].numpy(), rtol=0, atol=1e-12)

    logits = logits_of(probes.weights, sources_of(None, tensors["input/tokens_0"]))
    for i, (source, k) in place.items():
        assert error(logits[source][..., k], tensors["output/logits"][..., i]) < 1e-5
    for step, expected in enumerate(tensors["loss"].tolist()):
        features = sources_of(None, tensors[f"input/tokens_{step}"])
        losses = probes.step(features, tensors[f"input/labels_{step}"], factors[step + 1])
        assert losses.mean().item() == pytest.approx(expected, rel=1e-5)
        if step == 0:
            for i, gradients in own[1].items():
                source, k = place[i]
                views = {id(stack): views for stack, views in probes._views}
                for name, value in gradients.items():
                    found = views[id(probes.weights[source][name])][k].grad
                    found, value = (x[width:] if name == "kv.bias" else x for x in (found, value))
                    assert error(found, value) < 1e-4, name
    for i, weights in own[2].items():
        source, k = place[i]
        for name, value in weights.items():
            found = probes.weights[source][name][k]
            # The gradient of the keys' bias is 0 but for rounding, which Adam turns into steps, as that of few others.
            before = own[0][i][name]
            found, value, before = (x[width:] if name == "kv.bias" else x for x in (found, value, before))
            assert (~torch.isclose(found, value, rtol=1e-5, atol=1e-6)).float().mean() < 1e-2, name
            assert (found - value).norm() <= 1e-2 * (value - before).norm(), name


@pytest.mark.parametrize("file", files("metrics", "top1.safetensors"))
def test_public_top1_of_label_lists(file):
    tensors = load_file(file)
    right = [
        any_match(tensors[f"logits_{i}"].permute(2, 1, 0), tensors[f"labels_{i}"])
        for i in range(sum(key.startswith("logits_") for key in tensors))
    ]
    assert torch.equal(torch.cat(right).float().mean(0), tensors["accuracy"])


@pytest.mark.parametrize("file", files("capi", "segmentation.safetensors"))
def test_public_segmentation(file):
    tensors, expected = load_file(file), json.loads(file.with_suffix(".json").read_text())
    standardise = standardiser(tensors["train/features"].clone())
    parts = {part: Samples(standardise(tensors[f"{part}/features"].clone()), tensors[f"{part}/labels"])
             for part in ("train", "val", "test")}  # fmt: skip
    train, val = parts["train"], parts["val"]
    settings = [key.split("/")[1:] for key in expected if key.startswith("val_mIoU/")]
    neighbours = sorted({int(k) for _, k in settings})
    fitted = select_knn(train, val, IGNORED, neighbours=neighbours)
    for distance, k in settings:
        scores = fitted.validation[int(k), distance]
        assert scores.miou == pytest.approx(expected[f"val_mIoU/{distance}/{k}"], abs=1e-12)
        assert scores.accuracy == pytest.approx(expected[f"val_acc/{distance}/{k}"], abs=1e-12)
    for key in (key for key in tensors if "/pred_" in key):
        part, (_, distance, k, *refit) = key.split("/")[0], key.split("/")[1].split("_")
        fit_to = (train.joined(val) if refit else train).fitted(IGNORED)
        found = [blocks[int(k), distance] for _, blocks in knn(fit_to, parts[part].features, [(int(k), distance)])]
        assert torch.equal(torch.cat(found), tensors[key])
        if refit:
            scores = scores_of(confusion(parts[part].labels, tensors[key]), IGNORED)
            assert scores.miou == pytest.approx(expected[f"{part}_mIoU_refit/{distance}/{k}"], abs=1e-12)
            assert scores.accuracy == pytest.approx(expected[f"{part}_acc_refit/{distance}/{k}"], abs=1e-12)
    penalties = {key: float(key.partition("=")[2]) for key in expected if key.startswith("val_mIoU_logreg_sklearn/")}
    # Names have four digits of CAPI's penalties.
    near = [min((*INVERSE_PENALTIES, p), key=lambda C, p=p: abs(C / p - 1) > 1e-3) for p in penalties.values()]
    pytest.importorskip("sklearn")
    found = select_regression(train, val, IGNORED, penalties=near).validation
    # L-BFGS ends elsewhere with another rounding or tolerance (here 1e-10): two patches near a border may differ.
    for key, C in zip(penalties, near, strict=True):
        assert found[C,].miou == pytest.approx(expected[key], abs=4 / len(val.features)), key


@pytest.mark.parametrize("file", files("capi", "segmentation.safetensors"))
def test_public_miou(file):
    tensors, expected = load_file(file), json.loads(file.with_suffix(".json").read_text())
    for key in (key for key in expected if key.startswith("miou_")):
        case, _, what = key.partition("/")
        ignore = [int(label) for label in what.partition("=")[2].split(",")]
        scores = scores_of(confusion(tensors[f"{case}/gt"], tensors[f"{case}/pred"]), ignore)
        assert (scores.accuracy if "acc" in what else scores.miou) == pytest.approx(expected[key], abs=1e-12)
