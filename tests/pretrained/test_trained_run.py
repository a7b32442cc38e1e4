"""Checkpoints as training writes them, which hold what is learnt and nothing else."""

import dataclasses

import pytest
import torch

import fastmum
from fastmum.config.schema import OptimSection
from fastmum.export import export
from fastmum.training.checkpoint import Checkpoints
from fastmum.training.master import MasterWeights
from fastmum.training.optim import AdamW


@pytest.fixture
def trained(tmp_path, tiny):
    writer = Checkpoints(tmp_path / "run/checkpoints", keep=1)
    state = AdamW(MasterWeights(tiny, torch.float32), OptimSection()).state()
    assert not any("periods" in name for name in state)
    writer.save(5, state, {"model_config": dataclasses.asdict(tiny.config)})
    writer.close()
    return tmp_path / "run"


@pytest.mark.parametrize("encoder_only", [False, True])
def test_loads_and_exports(trained, tiny, encoder_only, tmp_path):
    model = fastmum.load_pretrained(trained, encoder_only=encoder_only)
    file = export(trained, "safetensors", tmp_path / "weights", encoder_only).file
    for found in (model, fastmum.load_pretrained(file)):
        state = found.state_dict()
        assert ("mask_token" in state) != encoder_only
        for name, tensor in state.items():
            assert torch.equal(tensor, tiny.state_dict()[name]), name
