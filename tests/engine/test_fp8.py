"""fp8 is refused on devices without it; the converted layers, and their products by emulation."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from fastmum.config import ConfigError
from fastmum.engine import fp8
from fastmum.engine.fp8 import check_fp8, use_fp8
from fastmum.model.compile import blocks_of

needs_torchao = pytest.mark.skipif(not fp8.is_there(), reason="torchao is not installed: pip install 'fastmum[fp8]'")


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


@needs_torchao
def test_any_number_of_tokens(monkeypatch):
    """On CUDA the inner side and the second operand's sides must be multiples of 16; the CPU takes all."""
    shapes, multiply = [], torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, *args, **kwargs: (
        shapes.append((a.shape[1], *b.shape)), multiply(a, b, *args, **kwargs))[1])  # fmt: skip
    model = nn.Sequential(nn.Linear(32, 64))
    assert use_fp8(model, [model]) == 1
    x = torch.randn(33, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert len(shapes) == 3
    assert not any(n % fp8.MULTIPLE for sides in shapes for n in sides), shapes


@needs_torchao
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
