"""Attention maps are the attention that the model computes."""

import numpy as np
import pytest
import torch

from fastmum.attention import ragged_attention
from fastmum.data.errors import DataError
from fastmum.evaluate import attention_maps, evaluate_attention
from fastmum.evaluate.attention import Recorder
from fastmum.evaluate.pairs import PairSet, pair_warp
from fastmum.evaluate.pictures import draw_attention, draw_warp
from fastmum.model.encoder import Encoder


@pytest.mark.parametrize("with_cls", [True, False])
def test_recorder_is_attention_and_keeps_its_rows(with_cls):
    patches, pairs, heads, width = 6, 3, 2, 8
    per_frame = patches + with_cls
    q = torch.randn(pairs * 2 * per_frame, heads, width)
    k, v = torch.randn(2, pairs * 2 * (1 + patches), heads, width)
    recorder = Recorder(pairs, patches)
    out = recorder(q, k, v)
    ends_k, ends_q = (torch.arange(pairs + 1, dtype=torch.int32) * 2 * n for n in (1 + patches, per_frame))
    expected = ragged_attention(q, k, v, ends_k, 2 * (1 + patches), cu_seqlens_q=ends_q, max_seqlen_q=2 * per_frame)
    assert torch.equal(out, expected)
    by_head_q, by_head_k = (x.unflatten(0, (pairs, -1)).transpose(1, 2) for x in (q, k))
    weights = (by_head_q @ by_head_k.mT * width**-0.5).softmax(-1).mean(1)
    assert torch.allclose(recorder.maps[0], weights[:, int(with_cls) : per_frame, 2 + patches :], atol=1e-6)


def test_maps_of_a_model(tiny):
    tiny.eval()
    images = torch.randint(0, 256, (4, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    maps = attention_maps(tiny, images)
    assert maps.shape == (1, 2, 6, 6)
    assert (maps.sum(-1) < 1).all()
    assert torch.allclose(attention_maps(tiny, images[:2]), maps[:, :1], atol=1e-6)  # pairs do not see each other
    twice = attention_maps(tiny, images[[0, 0]])
    assert (twice.sum(-1) < 0.5).all()  # as much goes to the frame itself, and some to CLS


def test_matching_by_the_best_block(wall_pairs, monkeypatch, tiny):
    """If all attention of a block is on the true match, its error is at most half a patch."""
    pairs, seen = iter(wall_pairs.pairs[:3]), []

    def blind_and_true(model, images):
        seen.append(len(images))
        cells = [(pair_warp(next(pairs), 4, 4).points.clamp(0, 0.999) * 4).long() for _ in range(len(images) // 2)]
        maps = [torch.nn.functional.one_hot(cell[:, 1] * 4 + cell[:, 0], 16).float() for cell in cells]
        return torch.stack([torch.full((len(maps), 16, 16), 1 / 16), torch.stack(maps)])

    monkeypatch.setattr("fastmum.evaluate.attention.attention_maps", blind_and_true)
    result = evaluate_attention(tiny, PairSet("wall", wall_pairs.pairs[:3]), 64)
    assert seen == [4, 2]  # two pairs, and one
    blocks = result.numbers["blocks"]
    assert list(blocks) == ["mean", "0", "1"]
    assert blocks["1"]["epe"] < 448 / 4 * 0.71 < blocks["0"]["epe"]
    best = min(blocks, key=lambda name: blocks[name]["epe"])
    assert (result.numbers["best"], result.numbers["scores"]) == (best, blocks[best])
    assert result.warps.shape == (3, 16, 2)


def test_models_without_finite_attention_or_decoder(wall_pairs, tiny):
    with torch.no_grad():
        tiny.norm.bias[0] = torch.nan
    for model, message in ((tiny.eval(), "'wall'"), (Encoder(tiny.config), "decoder")):
        with pytest.raises(DataError, match=message):
            evaluate_attention(model, wall_pairs, 32)


def test_pictures(tiny, wall_pairs):
    pair = wall_pairs.pairs[0]
    warp = draw_warp(pair, pair_warp(pair, 4, 4).points, 64)
    picture = draw_attention(tiny.eval(), pair, 64)  # A, B, one block, mean
    assert picture.size == warp.size == (4 * 256 + 3 * 4, 18 + 256)
    moved, true = (torch.from_numpy(np.array(warp.crop((x, 18, x + 256, 274)))) for x in (260, 520))
    assert (moved.float() - true.float()).abs()[(true < 255).any(-1)].mean() < 12
