"""Masks, and the count of operations against what torch counts while the model runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fastmum import PRESETS, ModelConfig, MuM
from fastmum.model.config import step_flops
from fastmum.model.inputs import num_visible, seeded_noise, split_by_noise


@given(
    noise=st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), min_size=7, max_size=7), min_size=1, max_size=4),
    visible=st.integers(1, 6),
)
def test_the_smallest_are_visible_ties_by_index(noise, visible):
    visible_ids, masked_ids = split_by_noise(torch.tensor(noise), visible)
    for row, seen, hidden in zip(noise, visible_ids.tolist(), masked_ids.tolist(), strict=True):
        by_hand = sorted(sorted(range(7), key=lambda i: (row[i], i))[:visible])
        assert seen == by_hand
        assert hidden == [i for i in range(7) if i not in by_hand]


def test_noise_is_uniform_and_a_function_of_its_arguments_and_hides_a_share_of_patches():
    for patches, ratio, count in ((256, 0.75, 64), (64, 0.75, 16), (15, 0.6, 6), (16, 0.9, 1)):
        assert num_visible(patches, ratio) == int(patches * (1 - ratio)) == count
    base = seeded_noise(1, 2, 3, 64, 256)
    assert torch.equal(base, seeded_noise(1, 2, 3, 64, 256))
    for other in [(0, 2, 3), (1, 0, 3), (1, 2, 0)]:
        assert not torch.equal(base, seeded_noise(*other, 64, 256))
    assert base.min() >= 0
    assert base.max() < 1
    assert base.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("config", "lengths"), [(ModelConfig(32, 2, 2, 48, 4, 2), [4]), (ModelConfig(64, 3, 2, 32, 2, 2), [1, 3])]
)
def test_linear_layers_are_those_that_torch_counts(config, lengths):
    model = MuM(config)
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 3, 64, 64), lengths, 0.75).loss.backward()
    # Attention is one operator, which torch does not count.
    assert step_flops(config, 16, 4, lengths).linear == counter.get_total_flops()
    assert 2.0e12 < step_flops(PRESETS["mum_vitl16"], 256, 64, [4, 4]).total < 2.4e12  # of the paper's model, 256 px


@pytest.mark.parametrize("lengths", [[4], [1, 3]])
def test_attention_against_plain_products(lengths):
    masked, tokens = 12, 17

    def count(queries: int, keys: int, width: int) -> int:
        q, k = torch.randn(1, 1, queries, width, requires_grad=True), torch.randn(1, 1, keys, width, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            (torch.nn.functional.softmax(q @ k.mT, -1) @ k.clone()).sum().backward()
        return counter.get_total_flops()

    expected = 2 * 4 * count(5, 5, 32) + 2 * 4 * count(tokens, tokens, 48)
    expected += sum(count(S * tokens, S * tokens, 48) + count(S * masked, S * tokens, 48) for S in lengths)
    assert step_flops(ModelConfig(32, 2, 2, 48, 4, 2), 16, 4, lengths).attention == expected
