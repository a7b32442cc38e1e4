"""The convention of CAPI's evaluations, called as they call it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import fastmum.capi_loader


def test_the_evaluations_use_of_a_model(monkeypatch, tiny, tmp_path):
    """As CAPI's `eval_*.py`, from words of a command line: by the file's path, outside of its package."""
    torch.save(tiny.state_dict(), tmp_path / "weights.pth")
    done = subprocess.run([sys.executable, "-m", "fastmum.capi_loader"], capture_output=True, text=True, check=True)
    file = Path(done.stdout.strip())
    assert file == Path(fastmum.capi_loader.__file__)

    def load(*words):
        words = [f"pretrained_weights={tmp_path / 'weights.pth'}", *words]
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, file.stem, module)
        spec.loader.exec_module(module)
        return module.__model_loader__(**OmegaConf.to_object(OmegaConf.from_cli(words)))

    model = load()
    assert isinstance(model, torch.nn.Module)
    assert not model.training
    assert model.patch_size == 16
    images = torch.randn(2, 3, 48, 80)
    ours = tiny.forward_features(images)
    with torch.inference_mode():  # feature extraction
        cls, registers, patches = model(images)
    assert registers is None
    assert torch.equal(cls, ours["x_norm_clstoken"])
    assert torch.equal(patches, ours["x_norm_patchtokens"].reshape(2, 3, 5, 32))
    cls, _, patches = load("dtype=bfloat16")(images)
    assert cls.dtype == patches.dtype == torch.float32  # for CAPI's classifiers, which are float32
    model = load("norm_eps=1e-6", "dtype=bfloat16")
    assert model.encoder.norm.eps == 1e-6
    assert model.encoder.cls_token.dtype == torch.bfloat16
    for word in ("encoder_only=1", "device=tpu"):
        with pytest.raises(RuntimeError, match=f"model_loader_kwargs.{word.split('=')[0]}"):
            load(word)
