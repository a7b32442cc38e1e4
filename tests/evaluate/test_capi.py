"""The real code of facebookresearch/capi, unmodified, on fastmum's loader; and fastmum's scores against its scores.

FASTMUM_CAPI names a checkout. It needs the packages that CAPI imports, without cuML and CUDA.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastmum.capi_loader
from fastmum import ModelConfig, MuM, load_encoder
from fastmum.evaluate.images import open_images
from fastmum.evaluate.maps import open_maps
from fastmum.evaluate.recognition import evaluate_recognition, evaluate_segmentation
from fastmum.tasks.recognition.probes import ClassifierSettings

PACKAGES = (
    "torchvision",
    "torchmetrics",
    "jaxtyping",
    "einops",
    "datasets",
    "pandas",
    "rich",
    "tabulate",
    "filelock",
    "sklearn",
)
CAPI = Path(os.environ.get("FASTMUM_CAPI") or "absent")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CAPI / "eval_segmentation.py").is_file(), reason="FASTMUM_CAPI names no checkout of CAPI"),
    pytest.mark.skipif(bool(MISSING), reason=f"CAPI's packages are not installed: {', '.join(MISSING)}"),
]
RATES, DECAYS = (1e-3, 1e-2), (5e-4,)
SIZE = 96  # of the images with labels of pixels


@pytest.fixture
def data(tmp_path):
    """Photographs of three colours in class folders, and the same as ADE20K with two regions each."""
    rng = np.random.default_rng(0)
    for part, other, count in (("train", "training", 20), ("val", "validation", 6)):
        for k in range(count):
            a, b = rng.permutation(3)[:2]
            width, height = rng.integers(200, 300, 2)
            image, label = rng.integers(0, 100, (height, width, 3)), np.full((height, width), a + 1, np.uint8)
            image[..., a] += 120
            file = tmp_path / f"images/{part}/class{a}/{k:02d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(file, quality=95)
            cut = width // 2 + int(rng.integers(-40, 40))
            image[:, cut:, a] -= 120
            image[:, cut:, b] += 120
            label[:, cut:], label[:20] = b + 1, 0
            for kind, pixels, suffix in (("images", image.astype(np.uint8), "jpg"), ("annotations", label, "png")):
                file = tmp_path / f"ade/ADEChallengeData2016/{kind}/{other}/ADE_{k:02d}.{suffix}"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file, **({"quality": 95} if suffix == "jpg" else {}))
    return tmp_path


def test_capis_evaluations_and_ours(data):
    torch.manual_seed(0)
    weights = data / "weights.pth"
    torch.save(MuM(ModelConfig(64, 2, 1, 32, 2, 2)).state_dict(), weights)
    models = {
        "float32": {"pretrained_weights": str(weights)},
        "bfloat16": {"pretrained_weights": str(weights), "dtype": "bfloat16"},
        "patches of 32": {"pretrained_weights": "random:mum_tiny", "patch_size": 32},
    }
    folder = "torchvision://ImageFolder?root='{}'"
    images = {
        "train_dataset_name": folder.format(data / "images/train"),
        "test_dataset_names": [folder.format(data / "images/val")],
        "n_iters": 30, "warmup_iters": 3, "batch_size": 16, "learning_rates": RATES, "weight_decays": DECAYS,
        "use_compile": False, "num_workers": 0, "eval_period": 0, "save_checkpoint_period": 1000, "num_classes": 3,
        "auto_resume": False,
    }  # fmt: skip
    ade = "custom://ADE20K?root='{}'&split='{}'"
    maps = {
        "train_dataset_name": ade.format(data / "ade", "training"), "num_workers": 0, "resolution": SIZE,
        "test_dataset_name": ade.format(data / "ade", "validation"), "classifiers_kwargs": {"knn": {"device": "cpu"}},
    }  # fmt: skip
    job = {"capi": str(CAPI.resolve()), "out": str(data), "loader": fastmum.capi_loader.__file__, "models": models}
    script = Path(__file__).parents[1] / "capi_run.py"
    words = [sys.executable, script, json.dumps(job | {"images": images, "maps": maps})]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    for name in models:
        top1 = theirs[f"{name} eval_classification"]
        assert {key.partition("_torch")[0] for key in top1} == {"cls", "avg_patch", "cls_avg_patch", "patch"}
        assert all(0 <= value <= 1 for value in top1.values())
        encoder = load_encoder(**{"spec": models[name]["pretrained_weights"], **{
            key: value for key, value in models[name].items() if key != "pretrained_weights"}}).eval()  # fmt: skip
        segmented = theirs[f"{name} eval_segmentation"]
        ours = evaluate_segmentation(encoder, open_maps(f"ade20k:{data / 'ade'}"), SIZE).numbers
        for kind in ("knn", "logreg"):
            assert ours["scores"][f"{kind}_miou"] == pytest.approx(100 * segmented[f"labels_{kind}_mIoU"], abs=0.2)
            assert ours["scores"][f"{kind}_accuracy"] == pytest.approx(100 * segmented[f"labels_{kind}_acc"], abs=0.2)
            expected = [100 * value for key, value in segmented.items() if key.startswith(f"hparam_fitting.{kind}.")]
            assert [*ours["validation"][kind].values()] == pytest.approx(expected, abs=0.5)
    settings = ClassifierSettings(30, 16, RATES, DECAYS)
    encoder = load_encoder(str(weights)).eval()
    ours = evaluate_recognition(encoder, open_images(str(data / "images")), settings).numbers["scores"]
    for source in ("cls", "avg_patch", "cls_avg_patch"):  # other initial weights and crops
        (value,) = (x for key, x in theirs["float32 eval_classification"].items() if key.startswith(f"{source}_torch"))
        assert abs(ours[f"top1_{source}"] - 100 * value) <= 100 / 3, source
