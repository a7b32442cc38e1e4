"""The convention of CAPI's evaluations, called as they call it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import fastmum.capi_loader


@pytest.fixture
def weights(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def load(monkeypatch):
    """From words of a command line, as CAPI's `eval_*.py`: by the file's path, outside of its package."""

    def call(*words):
        settings = OmegaConf.to_object(OmegaConf.from_cli(list(words)))
        file = Path(settings.pop("model_path")).resolve()
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, file.stem, module)
        spec.loader.exec_module(module)
        return module.__model_loader__(**settings.pop("model_loader_kwargs", {}))

    return call


def test_it_prints_where_it_lies():
    found = subprocess.run([sys.executable, "-m", "fastmum.capi_loader"], capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == Path(fastmum.capi_loader.__file__)


def test_what_the_evaluations_do_with_a_model(load, weights, tiny):
    file = fastmum.capi_loader.__file__
    model = load(f"model_path={file}", f"model_loader_kwargs.pretrained_weights={weights}")
    assert isinstance(model, torch.nn.Module)
    assert not model.training
    assert model.patch_size == 16
    model.requires_grad_(False)
    images = torch.randn(2, 3, 48, 80)
    ours = tiny.forward_features(images)
    with torch.inference_mode():  # feature extraction
        cls, registers, patches = model(images)
    assert registers is None
    assert torch.equal(cls, ours["x_norm_clstoken"])
    assert torch.equal(patches.reshape(2, 15, 32), ours["x_norm_patchtokens"])
    assert patches.shape == (2, 3, 5, 32)
    assert torch.equal(patches[1, 2, 4], ours["x_norm_patchtokens"][1, -1])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert (model(images)[2] - patches).abs().max() < 0.05
    model.cpu()  # then it is emptied
    for part in (model._parameters, model._modules):
        part.clear()


def test_compiled_with_what_follows_it(load, weights):
    model = load(f"model_path={fastmum.capi_loader.__file__}", f"model_loader_kwargs.pretrained_weights={weights}")
    head = torch.nn.Linear(32, 5)

    def forward(images):  # classification: CLS and the mean of the patches
        cls, _, patches = model(images)
        return head(cls) + head(patches.flatten(1, 2).float().mean(1))

    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(forward, backend="aot_eager")(images), forward(images))


def test_overrides_and_mistakes(load, weights):
    words = f"model_path={fastmum.capi_loader.__file__}", f"model_loader_kwargs.pretrained_weights={weights}"
    model = load(*words, "model_loader_kwargs.norm_eps=1e-6", "model_loader_kwargs.dtype=bfloat16")
    assert model.encoder.norm.eps == 1e-6
    assert model.encoder.cls_token.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="nearest is 'norm_eps'"):
        load(*words, "model_loader_kwargs.norm_esp=1e-6")
    with pytest.raises(RuntimeError, match=r"^model_loader_kwargs.encoder_only cannot be set"):
        load(*words, "model_loader_kwargs.encoder_only=1")
    with pytest.raises(RuntimeError, match=r"^model_loader_kwargs.device is 'tpu', but must be auto, cpu"):
        load(*words, "model_loader_kwargs.device=tpu")
