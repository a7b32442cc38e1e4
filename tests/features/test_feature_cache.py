"""Features on disk: each image of each encoder is computed once."""

import logging

import pytest
import torch

import fastmum
from fastmum.features import FeatureCache, FeaturesError, Tokens, file_key, frozen_tokens, image_key
from fastmum.features.images import Placement

IMAGES = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
KEYS = [image_key(image) for image in IMAGES]


def test_features_are_computed_once(tiny, tmp_path, caplog):
    torch.save(tiny.state_dict(), tmp_path / "w.pth")
    encoder, other, calls = fastmum.load_encoder(tmp_path / "w.pth"), fastmum.load_encoder("random:mum_tiny"), []

    def tokens(encoder, keys, **about):
        def compute(missing):
            calls.append(missing)
            (found,) = encoder.tokens(IMAGES[missing], norm=True)
            rows = zip(found.cls, found.patch, strict=True)
            return [Tokens(cls, patch, Placement(32, 48, 32, 48)) for cls, patch in rows]

        return FeatureCache(tmp_path / "cache", encoder, about).tokens(keys, compute)

    (first,) = tokens(encoder, KEYS[:1])
    both = tokens(fastmum.load_encoder(tmp_path / "w.pth"), KEYS)
    assert calls == [[0], [1]]
    assert torch.equal(both[0].patch, first.patch)
    assert torch.equal(both[1].patch, encoder.tokens(IMAGES[1:], norm=True)[0].patch[0])
    tokens(encoder, KEYS, size=32)  # another transform
    tokens(fastmum.load_encoder(tmp_path / "w.pth", norm_eps=1e-6), KEYS)
    tokens(other, KEYS)
    assert calls[2:] == [[0, 1]] * 3
    for file in (tmp_path / "cache").glob("*/*.safetensors"):
        file.write_bytes(b"")  # a damaged disk
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(tokens(encoder, KEYS)[0].patch, first.patch)
    assert "computed again" in caplog.text
    with pytest.raises(FeaturesError, match="train mode"):
        tokens(encoder.train(), KEYS)


def test_names_that_are_not_utf8(tmp_path):
    cache = FeatureCache(tmp_path / "cache", fastmum.load_encoder("random:mum_tiny"), {})
    tokens = Tokens(None, torch.ones(4, 2), Placement(32, 32, 32, 32))
    for _ in range(2):
        (found,) = cache.tokens(["b\udce9.jpg"], lambda missing: [tokens])
        assert torch.equal(found.patch, tokens.patch)
    assert cache.has("b\udce9.jpg")


def test_keys_follow_the_content(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"1")
    key = file_key(file)
    assert file_key(file) == key
    file.write_bytes(b"22")
    assert file_key(file) != key
    assert len({*KEYS, image_key(IMAGES[0].transpose(0, 1))}) == 3


def test_tokens_of_several_blocks(tmp_path, monkeypatch):
    """In float16, from the cache where they are there; those that overflow are cut off, and infinite ones an error."""
    encoder, calls = fastmum.load_encoder("random:mum_tiny"), []
    forward = encoder.tokens
    monkeypatch.setattr(
        encoder, "tokens", lambda images, *a, **k: calls.append(len(images)) or forward(images, *a, **k)
    )
    cache = FeatureCache(tmp_path, encoder, {"blocks": [0, 2]})
    (patch, cls), expected = frozen_tokens(encoder, IMAGES, [0, 2]), forward(IMAGES, [0, 2], norm=False)
    torch.testing.assert_close(patch.float(), torch.stack([each.patch for each in expected], 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(cls.float(), torch.stack([each.cls for each in expected], 1), rtol=1e-3, atol=1e-3)
    frozen_tokens(encoder, IMAGES[1:], [0, 2], cache)
    both = frozen_tokens(encoder, IMAGES, [0, 2], cache)
    assert calls == [2, 1, 1]
    torch.testing.assert_close(both, (patch, cls), rtol=1e-2, atol=1e-3)
    encoder.blocks[2].mlp.fc2.bias.data.fill_(1e6)
    assert frozen_tokens(encoder, IMAGES, [2])[0].max() == torch.finfo(torch.float16).max
    encoder.blocks[2].mlp.fc2.bias.data.fill_(torch.inf)
    with pytest.raises(FeaturesError, match="not finite"):
        frozen_tokens(encoder, IMAGES, [2])
