import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize(("patches", "ratio", "count"), [(256, 0.75, 64), (64, 0.75, 16), (15, 0.6, 6), (16, 0.9, 1)])
def test_number_of_visible_patches(patches, ratio, count):
    assert num_visible(patches, ratio) == int(patches * (1 - ratio)) == count


def test_seeded_noise_is_uniform_and_a_function_of_its_arguments():
    base = seeded_noise(1, 2, 3, 64, 256)
    assert torch.equal(base, seeded_noise(1, 2, 3, 64, 256))
    for other in [(0, 2, 3), (1, 0, 3), (1, 2, 0)]:
        assert not torch.equal(base, seeded_noise(*other, 64, 256))
    assert base.min() >= 0
    assert base.max() < 1
    assert base.mean().item() == pytest.approx(0.5, abs=0.01)
