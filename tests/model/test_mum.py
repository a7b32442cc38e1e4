"""Behaviour of the whole model."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmum import PRESETS, ModelConfig, MuM
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD, seeded_noise

P = 6  # patches of a 32 x 48 frame


def frames(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def noise(count: int) -> torch.Tensor:
    return seeded_noise(0, 0, 0, count, P)


def test_ragged_batch_equals_separate_sequences(tiny):
    lengths = [3, 1, 2, 2, 4]
    x, u = frames(12), noise(12)
    together = tiny(x, lengths, 0.5, u)
    alone = [tiny(a, [len(a)], 0.5, b).pred for a, b in zip(x.split(lengths), u.split(lengths), strict=True)]
    torch.testing.assert_close(together.pred, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_attention_stays_within_a_sequence(tiny):
    x, u = frames(5), noise(5)
    before = tiny(x, [3, 2], 0.5, u).pred
    changed = x.clone()
    changed[0] += 1
    moved = (tiny(changed, torch.tensor([3, 2]), 0.5, u).pred - before).abs().amax(dim=(1, 2))
    assert (moved[:3] > 1e-5).all(), "another view of the sequence must change the prediction"
    assert (moved[3:] == 0).all(), "no token of one sequence may reach another"


def test_order_of_views_does_not_matter(tiny):
    x, u = frames(4), noise(4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(tiny(x[order], [4], 0.5, u[order]).pred, tiny(x, [4], 0.5, u).pred[order],
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_raw_and_normalised_frames_agree(tiny):
    raw = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    normalised = ((raw / 255 - mean) / std).permute(0, 3, 1, 2)
    a, b = (tiny(x, [3], 0.5, noise(3)) for x in (raw, normalised))
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(a.pred, b.pred, rtol=1e-4, atol=1e-5)
    features = tiny.forward_features(raw)["x_norm_patchtokens"]
    torch.testing.assert_close(features, tiny.forward_features(normalised)["x_norm_patchtokens"], rtol=1e-4, atol=1e-5)


def test_output_shapes_and_the_loss_by_hand(tiny):
    x = frames(2)
    out = tiny(x, [2], 0.5, noise(2))
    assert out.pred.shape == (2, 3, 768)
    assert out.visible_ids.shape == out.masked_ids.shape == (2, 3)
    patches = x.reshape(2, 3, 2, 16, 3, 16).permute(0, 2, 4, 3, 5, 1).reshape(2, P, 768)
    target = torch.stack([patches[f, out.masked_ids[f]] for f in range(2)])
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(out.loss, ((out.pred - target) ** 2).mean())


def test_a_constant_patch_has_a_finite_loss(tiny):
    out = tiny(torch.zeros(2, 32, 48, 3, dtype=torch.uint8), [2])
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in tiny.parameters())


def test_masks_are_random_without_noise(tiny):
    torch.manual_seed(1)
    first = tiny(frames(4), [4]).masked_ids
    second = tiny(frames(4), [4]).masked_ids
    assert first.shape == (4, P - 1)
    assert not torch.equal(first, second)


def test_mixed_precision_stays_close_and_keeps_the_loss_in_float32(tiny):
    exact = tiny(frames(4), [4], 0.5, noise(4))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tiny(frames(4), [4], 0.5, noise(4))
    assert rounded.loss.dtype == torch.float32
    assert rounded.pred.dtype == torch.bfloat16
    assert (rounded.loss - exact.loss).abs() / exact.loss < 1e-2


@pytest.mark.parametrize("size", [(16, 16), (48, 80)])
def test_features_of_any_size(tiny, size):
    x = torch.randn(2, 3, *size)
    out = tiny.forward_features(x)
    patches = size[0] * size[1] // 256
    assert out["x_norm_clstoken"].shape == (2, 32)
    assert out["x_norm_patchtokens"].shape == (2, patches, 32)
    assert out["x_prenorm"].shape == (2, 1 + patches, 32)


def test_intermediate_layers_as_in_dinov2(tiny):
    x = frames(2)
    last = tiny.get_intermediate_layers(x)[0]
    features = tiny.forward_features(x)
    assert torch.equal(last, features["x_norm_patchtokens"])
    (first, cls), (_, last_cls) = tiny.get_intermediate_layers(x, n=[0, 1], return_class_token=True)
    assert first.shape == (2, P, 32)
    assert cls.shape == (2, 32)
    assert torch.equal(last_cls, features["x_norm_clstoken"])
    maps = tiny.get_intermediate_layers(x, n=2, reshape=True)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 2, 3)] * 2
    assert torch.equal(maps[1].flatten(2).transpose(1, 2), last)
    raw = tiny.get_intermediate_layers(x, norm=False)[0]
    assert torch.equal(tiny.norm(raw), last)


def test_blocks_that_do_not_exist(tiny):
    for n in (0, 3, [2], [-1], []):
        with pytest.raises(ValueError, match=r"n is .* 2 blocks"):
            tiny.get_intermediate_layers(frames(1), n=n)


def test_initialisation():
    torch.manual_seed(0)
    model = MuM(PRESETS["mum_tiny"])
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.startswith("patch_embed"):
            continue
        if name.endswith("token") or (parameter.ndim == 2):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
        else:
            assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name


def test_initialisation_after_the_meta_device():
    with torch.device("meta"):
        late = MuM(PRESETS["mum_tiny"])
    late.to_empty(device="cpu")
    models = late, MuM(PRESETS["mum_tiny"])
    for model in models:
        torch.manual_seed(0)
        model.init_weights()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_the_state_dict_can_be_written_as_safetensors_and_read_back(tiny, tmp_path):
    save_file(tiny.state_dict(), tmp_path / "weights.safetensors")
    other = MuM(tiny.config)
    strides = other.patch_embed.proj.weight.stride()
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    torch.testing.assert_close(other.state_dict(), tiny.state_dict(), rtol=0, atol=0)
    assert other.patch_embed.proj.weight.stride() == strides, "patches are still a matrix product without a copy"


def test_sizes_of_the_presets():
    def millions(name: str) -> float:
        with torch.device("meta"):
            model = MuM(PRESETS[name])
        return sum(p.numel() for p in model.parameters()) / 1e6

    assert millions("mum_vitl16") == pytest.approx(389.5, abs=0.05)  # supplement, "Architecture"
    assert millions("mum_vitl16_released") == millions("mum_vitl16")
    assert PRESETS["mum_vitl16"].decoder_num_heads == 12
    assert PRESETS["mum_vitl16_released"].decoder_num_heads == 16
    assert PRESETS["mum_vitb16"] == ModelConfig(768, 12, 12, 512, 8, 16)


def test_wrong_arguments_are_named(tiny):
    for change, error, words in [
        ({"frames": "x"}, TypeError, "frames is a str"),
        ({"frames": torch.zeros(2, 3, 32, 48, dtype=torch.int32)}, TypeError, "frames has dtype torch.int32"),
        ({"frames": torch.zeros(2, 4, 32, 48)}, ValueError, r"frames has shape \(2, 4, 32, 48\)"),
        ({"frames": torch.zeros(2, 3, 32, 48, dtype=torch.uint8)}, ValueError, r"frames has shape \(2, 3, 32, 48\)"),
        ({"frames": torch.zeros(3, 32, 48)}, ValueError, "frames has shape"),
        ({"frames": torch.zeros(2, 3, 30, 48)}, ValueError, "frames is 30 x 48 pixels"),
        ({"lengths": [1]}, ValueError, r"lengths is \[1\]"),
        ({"lengths": [2, 0]}, ValueError, r"lengths is \[2, 0\]"),
        ({"lengths": []}, ValueError, r"lengths is \[\]"),
        ({"lengths": torch.tensor([1.0, 1.0])}, TypeError, "lengths is a torch.float32 tensor"),
        ({"lengths": 2}, TypeError, "lengths is a int"),
        ({"lengths": [1.5, 0.5]}, TypeError, r"lengths is \[1.5, 0.5\]"),
        ({"max_views": "2"}, TypeError, "max_views is '2'"),
        ({"mask_ratio": 0.0}, ValueError, "mask_ratio is 0.0"),
        ({"mask_ratio": 0.99}, ValueError, "mask_ratio is 0.99"),
        ({"mask_ratio": 1.5}, ValueError, "mask_ratio is 1.5"),
        ({"noise": torch.rand(2, 5)}, ValueError, r"noise has shape \(2, 5\)"),
        ({"noise": torch.zeros(2, 6, dtype=torch.int64)}, TypeError, "noise has dtype torch.int64"),
    ]:
        with pytest.raises(error, match=words) as caught:
            tiny(**{"frames": frames(2), "lengths": [2], "mask_ratio": 0.5, "noise": None} | change)
        assert "\n" not in str(caught.value)


def test_invalid_sizes_are_named():
    sizes = (32, 2, 2, 32, 2, 2)
    for change, words in [
        ({"embed_dim": 30}, "embed_dim is 30 with num_heads 2"),
        ({"decoder_num_heads": 3}, "decoder_embed_dim is 32 with decoder_num_heads 3"),
        ({"decoder_depth": 3}, "decoder_depth is 3"),
        ({"depth": 0}, "depth is 0"),
        ({"num_heads": 2.0}, "num_heads is 2.0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"norm_eps": "1e-5"}, "norm_eps is '1e-5'"),
        ({"norm_eps": None}, "norm_eps is None"),
    ]:
        with pytest.raises(ValueError, match=words):
            replace(ModelConfig(*sizes), **change)
