"""fp8: refused where there is none, with the reason; which layers, and what it computes, by emulation."""

import copy

import pytest
import torch

from fastmum import MuM
from fastmum.config import ConfigError
from fastmum.engine import fp8
from fastmum.engine.fp8 import check_fp8, use_fp8
from fastmum.model.compile import blocks_of

needs_torchao = pytest.mark.skipif(not fp8.is_there(), reason="torchao is not installed: pip install 'fastmum[fp8]'")


@pytest.fixture
def gpu(monkeypatch):
    def gpu(name, capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return torch.device("cuda")

    return gpu


def test_refused_where_there_are_no_such_products(gpu):
    with pytest.raises(ConfigError, match="cpu devices have no float8 products: take bf16 or fp32"):
        check_fp8(torch.device("cpu"))
    with pytest.raises(ConfigError, match="NVIDIA A100 is sm_80, and float8 products need sm_89"):
        check_fp8(gpu("NVIDIA A100", (8, 0)))


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_taken_from_sm_89_on(gpu, monkeypatch, capability):
    monkeypatch.setattr(fp8, "is_there", lambda: True)
    check_fp8(gpu("a GPU", capability))
    monkeypatch.setattr(fp8, "is_there", lambda: False)
    with pytest.raises(ConfigError, match="'torchao' is not installed: pip install"):
        check_fp8(gpu("a GPU", capability))


@needs_torchao
def test_layers_of_the_blocks_alone_and_the_same_state(tiny):
    plain = copy.deepcopy(tiny)
    # Two encoder blocks, a frame block and a global one, four layers each.
    assert use_fp8(tiny, blocks_of(tiny), emulate=True) == 4 * 4
    assert not any("Float8" in type(module).__name__ for module in (tiny.decoder_embed, tiny.decoder_pred))
    torch.testing.assert_close(tiny.state_dict(), plain.state_dict(), rtol=0, atol=0)


@needs_torchao
def test_emulated_products_learn_what_bfloat16_learns(tiny):
    plain: MuM = copy.deepcopy(tiny)
    use_fp8(tiny, blocks_of(tiny), emulate=True)
    frames, noise = torch.randn(4, 3, 64, 64), torch.rand(4, 16)
    gradients, losses = [], []
    for model in (plain, tiny):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(frames, [2, 2], 0.5, noise).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98
    assert not torch.equal(*gradients), "the products were not those of fp8"
