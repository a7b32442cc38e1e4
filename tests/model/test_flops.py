"""The count of operations against what torch counts while the model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmum import PRESETS, ModelConfig, MuM
from fastmum.model.config import step_flops


@pytest.mark.parametrize("config", [ModelConfig(32, 2, 2, 48, 4, 2), ModelConfig(64, 3, 2, 32, 2, 2)])
@pytest.mark.parametrize("lengths", [[4], [1, 3]])
def test_linear_layers_are_those_that_torch_counts(config, lengths):
    model = MuM(config)
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 3, 64, 64), lengths, 0.75).loss.backward()
    # Attention is one operator, which torch does not count.
    assert step_flops(config, 16, 4, lengths).linear == counter.get_total_flops()


@pytest.mark.parametrize("lengths", [[4], [1, 3]])
def test_attention_against_plain_products(lengths):
    config = ModelConfig(32, 2, 2, 48, 4, 2)
    model = MuM(config)
    masked, tokens = 12, 17

    def count(queries: int, keys: int, width: int) -> int:
        q, k = torch.randn(1, 1, queries, width, requires_grad=True), torch.randn(1, 1, keys, width, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            (torch.nn.functional.softmax(q @ k.mT, -1) @ k.clone()).sum().backward()
        return counter.get_total_flops()

    expected = 2 * 4 * count(5, 5, 32) + 2 * 4 * count(tokens, tokens, 48)
    expected += sum(count(S * tokens, S * tokens, 48) + count(S * masked, S * tokens, 48) for S in lengths)
    assert step_flops(model.config, 16, 4, lengths).attention == expected


def test_the_paper_model():
    """2.2 TFLOP per step of 8 frames of 256 px."""
    assert 2.0e12 < step_flops(PRESETS["mum_vitl16"], 256, 64, [4, 4]).total < 2.4e12
