"""Heads, neighbours and scores against other implementations."""

import copy
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmum.data.decode.image import FrameError
from fastmum.errors import FastmumError
from fastmum.tasks.recognition.features import centre, random_crop
from fastmum.tasks.recognition.files import DataSet
from fastmum.tasks.recognition.probes import (
    ClassifierSettings,
    Probes,
    attentive_logits,
    logits_of,
    schedule,
    sources_of,
    visits,
)
from fastmum.tasks.recognition.segment import (
    Samples,
    block_modes,
    confusion,
    knn,
    label_blocks,
    nearest,
    regression,
    scores_of,
    standardiser,
)

B, N, D, C = 5, 9, 128, 6
RATES = {"learning_rates": (1e-3, 1e-2), "weight_decays": (0.0, 0.05)}


class Pooling(nn.Module):
    """Attention of a learnt query in the usual way, by multi-head attention of PyTorch."""

    def __init__(self, weights, q):
        super().__init__()
        self.query_token, kv, bias = (
            nn.Parameter(weights[n][q].detach().clone()) for n in ("query_token", "kv.weight", "kv.bias")
        )
        self.kv, self.linear = nn.Linear(D, 2 * D), nn.Linear(D, C)
        self.kv.weight, self.kv.bias = kv, bias
        for name in ("weight", "bias"):
            setattr(self.linear, name, nn.Parameter(weights[f"linear.{name}"][q].detach().clone()))

    def forward(self, x):
        k, v = self.kv(x).unflatten(2, (2, D // 64, 64)).permute(2, 0, 3, 1, 4)
        query = self.query_token.view(1, D // 64, 1, 64).expand(len(x), -1, -1, -1)
        return self.linear(F.scaled_dot_product_attention(query, k, v).flatten(1))


@pytest.fixture
def probes():
    settings = ClassifierSettings(steps=20, batch=256, **RATES)
    heads = settings.heads(["patch", "cls", "avg_patch", "cls_avg_patch"])
    widths = {"patch": D, "cls": D, "avg_patch": D, "cls_avg_patch": 2 * D}
    torch.manual_seed(0)
    made = Probes(heads, widths, C, 256)
    for stack in (stack for weights in made.weights.values() for stack in weights.values()):
        stack.data += 0.1 * torch.randn_like(stack)  # biases that matter
    return made


def test_attentive_heads_are_attention_with_its_gradients(probes):
    weights = {name: x.detach().double().requires_grad_() for name, x in probes.weights["patch"].items()}
    x, upstream = torch.randn(B, N, D, dtype=torch.float64), torch.randn(B, C, 4, dtype=torch.float64)
    logits = attentive_logits(weights, x)
    (logits * upstream).sum().backward()
    for q in range(4):
        other = Pooling(weights, q).double()
        expected = other(x)
        (expected * upstream[..., q]).sum().backward()
        assert torch.allclose(logits[..., q], expected, atol=1e-10)
        for name, parameter in other.named_parameters():
            assert torch.allclose(weights[name].grad[q], parameter.grad, atol=1e-10), name


def test_heads_train_as_if_alone(probes):
    """Each head of every source against its own modules and optimizer."""
    batches = [(torch.randn(B, D), torch.randn(B, N, D), torch.randint(C, (B,))) for _ in range(4)]
    alone = []
    for source, heads in probes.heads.items():
        for q, head in enumerate(heads):
            weights = probes.weights[source]
            module = Pooling(weights, q) if source == "patch" else nn.Linear(weights["linear.weight"].shape[-1], C)
            if source != "patch":
                for name in ("weight", "bias"):
                    setattr(module, name, nn.Parameter(weights[f"linear.{name}"][q].detach().clone()))
            groups = [
                {"params": [p], "weight_decay": 0.0 if "bias" in name else head.weight_decay}
                for name, p in module.named_parameters()
            ]
            alone.append((source, q, module, torch.optim.AdamW(groups, head.learning_rate, (0.9, 0.95))))
    for cls, patch, labels in batches:
        features = sources_of(cls, patch)
        losses = probes.step(features, labels, 1.0)
        for (source, _, module, optimizer), loss in zip(alone, losses.tolist(), strict=True):
            expected = F.cross_entropy(module(features[source]), labels)
            (expected / len(alone)).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert loss == pytest.approx(expected.item(), rel=1e-5)
    kept = probes.keep({"patch": 3, "cls": 1})
    for source, q in (("patch", 3), ("cls", 1)):
        module = next(module for s, i, module, _ in alone if (s, i) == (source, q))
        found = logits_of(kept, features)[source][..., 0]
        assert torch.allclose(found, module(features[source]), rtol=1e-4, atol=1e-4)


def test_a_head_that_diverges_leaves_the_others(probes):
    twin = copy.deepcopy(probes.weights["avg_patch"]["linear.weight"])
    probes.weights["avg_patch"]["linear.weight"].data[3] = torch.inf
    losses = probes.step(sources_of(torch.randn(B, D), torch.randn(B, N, D)), torch.randint(C, (B,)), 1.0)
    assert losses.isfinite().sum() == len(losses) - 1
    found = probes.weights["avg_patch"]["linear.weight"]
    assert found[:3].isfinite().all()
    assert not torch.equal(found[:3], twin[:3])


def test_settings_schedule_and_order():
    factors = schedule(50, 5)
    assert [factors[0], factors[4], factors[-1]] == [0, 1, pytest.approx(0, abs=1e-12)]
    assert len(ClassifierSettings().heads(["patch"])) == 30
    first = [next(each) for each in [visits(7, 42)] for _ in range(21)]
    assert [sorted(i for i, _ in first[k : k + 7]) for k in (0, 7, 14)] == [[*range(7)]] * 3
    assert [epoch for _, epoch in first] == [0] * 7 + [1] * 7 + [2] * 7
    for wrong in ({"steps": 1}, {"learning_rates": (-1.0,)}, {"weight_decays": ()}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ClassifierSettings(**wrong)
    with pytest.raises(FastmumError, match="multiple of 64"):
        Probes(ClassifierSettings().heads(["patch"]), {"patch": 96}, 3, 8)


def test_neighbours_and_scores_against_scikit_learn(monkeypatch):
    neighbors, metrics, preprocessing = (
        pytest.importorskip(f"sklearn.{name}") for name in ("neighbors", "metrics", "preprocessing")
    )
    monkeypatch.setattr("fastmum.tasks.recognition.segment.QUERIES", 16)
    monkeypatch.setattr("fastmum.tasks.recognition.segment.KEYS", 20)  # so that several parts are merged
    rng = np.random.default_rng(0)
    x, queries = (
        rng.normal(size=(n, 8)).astype(np.float32) * rng.uniform(1, 9, 8).astype(np.float32) for n in (90, 40)
    )
    scaler = preprocessing.StandardScaler().fit(x)
    standardise = standardiser(torch.from_numpy(x))
    assert np.allclose(standardise(torch.from_numpy(queries.copy())), scaler.transform(queries), atol=1e-5)
    labels = torch.from_numpy(rng.integers(0, 4, (90, 1), dtype=np.uint8))
    settings = [(k, distance) for k in (1, 5) for distance in ("cosine", "L2")]
    found = {setting: [] for setting in settings}
    for _, blocks in knn(Samples(torch.from_numpy(x), labels), torch.from_numpy(queries), settings):
        for setting, block in blocks.items():
            found[setting].append(block)
    truth = torch.from_numpy(rng.integers(0, 6, 40, dtype=np.uint8))
    for (k, distance), blocks in found.items():
        metric = "cosine" if distance == "cosine" else "euclidean"
        other = neighbors.KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(x, labels[:, 0])
        predicted = torch.cat(blocks)[:, 0]
        assert np.array_equal(predicted, other.predict(queries))
        scores, kept = scores_of(confusion(truth, predicted), (0, 5)), ~np.isin(truth, (0, 5))
        assert scores.miou == pytest.approx(metrics.jaccard_score(truth[kept], predicted[kept], average="macro"))
        assert scores.accuracy == pytest.approx((truth == predicted).numpy()[kept].mean())
        assert scores.ignored == int(0 in predicted[kept])  # a class of its own, with an IoU of 0
    with pytest.raises(FastmumError, match="ignored"):
        scores_of(confusion(truth, truth), range(6))


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 0), (torch.float64, 5 + 3)])
def test_keys_are_converted_once(monkeypatch, dtype, copies):
    """And not at all where they are what is needed: 90 keys in parts of 20, for 40 queries in parts of 16."""
    monkeypatch.setattr("fastmum.tasks.recognition.segment.QUERIES", 16)
    monkeypatch.setattr("fastmum.tasks.recognition.segment.KEYS", 20)
    seen = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func is torch.ops.aten._to_copy.default)
            return func(*args, **(kwargs or {}))

    with Copies():
        assert sum(len(index) for _, index in nearest(torch.randn(40, 8), torch.randn(90, 8), 3, "L2", dtype)) == 40
    assert sum(seen) == copies


def test_regression_on_a_gpu_takes_what_cuml_has(monkeypatch):
    """A stand-in with the arguments and attributes of cuML's class, which has no `solver_model`."""
    linear_model = pytest.importorskip("sklearn.linear_model")

    class OnGPU:
        def __init__(self, *, penalty="l2", tol=1e-4, C=1.0, max_iter=1000, linesearch_max_iter=50, output_type=None):
            assert (penalty, output_type) == ("l2", "numpy")
            self.model = linear_model.LogisticRegression(C=C, max_iter=max_iter, tol=tol)

        def fit(self, X, y):
            self.model.fit(X, y)
            return self

        def predict(self, X):
            return self.model.predict(X)

    stub = ModuleType("cuml.linear_model")
    stub.LogisticRegression = OnGPU
    monkeypatch.setitem(sys.modules, "cuml", ModuleType("cuml"))
    monkeypatch.setitem(sys.modules, "cuml.linear_model", stub)
    labels = torch.randint(0, 3, (60, 1), dtype=torch.uint8)
    samples = Samples(torch.randn(60, 4) + labels, labels)
    on_gpu, on_cpu = (regression(samples, device)(1.0) for device in ("cuda", "cpu"))
    assert isinstance(on_gpu, OnGPU)
    assert np.array_equal(on_gpu.predict(samples.features.numpy()), on_cpu.predict(samples.features.numpy()))


def test_blocks_of_labels():
    label = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert label_blocks(label, 2)[:2].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert block_modes(torch.tensor([[3, 1, 3, 1], [2, 2, 0, 1]], dtype=torch.uint8)).tolist() == [1, 2]
    samples = Samples(torch.arange(2.0)[:, None], torch.tensor([[0, 0, 1], [0, 2, 2]], dtype=torch.uint8))
    assert samples.fitted((0, 255)).features.tolist() == [[1.0]]


def test_transforms():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8))
    whole = image.resize((256, 384), Image.Resampling.BICUBIC)
    assert np.array_equal(centre(224)(image), whole.crop((16, 80, 240, 304)))
    crops = [np.array(random_crop(32, (1, i))(image)) for i in (0, 0, 1)]
    assert crops[0].shape == (32, 32, 3)
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])


def test_a_file_that_shrinks_cannot_be_read(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/1.jpg").write_bytes(b"")
    (file,) = DataSet(tmp_path).files("train")
    assert file.key()
    for change in ((tmp_path / "train/a/1.jpg").touch, (tmp_path / "train/a/1.jpg").unlink):
        change()
        with pytest.raises(FrameError):
            file.read()
    with pytest.raises(FrameError):
        file.key()


MEMORY = """
import resource, torch
from fastmum.tasks.recognition.segment import Samples, knn
torch.manual_seed(0)
keys = Samples(torch.randn(20_000, 1024), torch.randint(0, 9, (20_000, 256), dtype=torch.uint8))
queries, settings = torch.randn(50_000, 1024), [(30, "cosine")]
rows = sum(len(block) for _, found in knn(keys, queries, settings) for block in found.values())
assert rows == 50_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_neighbours_of_many_wide_queries_fit_in_2_gb():
    """50 K queries of width 1,024 and 20 K keys with their labels, with all of the process."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2e9
