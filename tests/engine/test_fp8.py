"""fp8 is refused on devices without it; the converted layers, and their products by emulation."""

import contextlib
import copy

import pytest
import torch

from fastmum.config import ConfigError
from fastmum.engine import fp8
from fastmum.engine.fp8 import check_fp8, use_fp8
from fastmum.model.compile import blocks_of


def test_needs_sm_89_and_torchao(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match="cpu devices"):
        check_fp8(torch.device("cpu"))
    for installed, capability, message in (
        (True, (8, 0), "NVIDIA A100 is sm_80, .* sm_89"), (True, (8, 9), ""), (True, (9, 0), ""), (True, (10, 0), ""),
        (False, (9, 0), "'torchao' is not installed"),
    ):  # fmt: skip
        monkeypatch.setattr(fp8, "is_there", lambda installed=installed: installed)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
            check_fp8(torch.device("cuda"))


@pytest.mark.skipif(not fp8.is_there(), reason="torchao is not installed: pip install 'fastmum[fp8]'")
def test_emulated_layers_of_the_blocks_are_close_to_bfloat16(tiny):
    plain = copy.deepcopy(tiny)
    # Two encoder blocks, a frame block and a global one, four layers each.
    assert use_fp8(tiny, blocks_of(tiny), emulate=True) == 4 * 4
    assert not any("Float8" in type(module).__name__ for module in (tiny.decoder_embed, tiny.decoder_pred))
    torch.testing.assert_close(tiny.state_dict(), plain.state_dict(), rtol=0, atol=0)
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
    assert not torch.equal(*gradients), "the products were not fp8"
