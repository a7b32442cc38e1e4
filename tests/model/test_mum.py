"""Behaviour of the whole model, and the cost of a batch: static shapes, query subset, recomputation, frozen parts."""

from dataclasses import replace

import pytest
import torch

from fastmum import PRESETS, ModelConfig, MuM
from fastmum.attention import Segments
from fastmum.model.encoder import RECOMPUTE, Encoder
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
    alone = [tiny(a, [len(a)], 0.5, b) for a, b in zip(x.split(lengths), u.split(lengths), strict=True)]
    torch.testing.assert_close(together.pred, torch.cat([out.pred for out in alone]), rtol=1e-4, atol=1e-5)
    losses = together.loss, sum(n / 12 * out.loss for n, out in zip(lengths, alone, strict=True))
    for a, b in zip(*(torch.autograd.grad(loss, list(tiny.parameters())) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        x[0] += 1
    padded = tiny(x, torch.tensor([*lengths, *[0] * 7]), 0.5, u, max_views=4)
    assert torch.equal(padded.pred[3:], together.pred[3:])  # nothing of one sequence reaches another


def test_raw_and_normalised_frames_agree(tiny):
    raw = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    normalised = ((raw / 255 - mean) / std).permute(0, 3, 1, 2)
    a, b = (tiny(x, [3], 0.5, noise(3))._asdict() | tiny.forward_features(x) for x in (raw, normalised))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_constant_patches_and_random_masks(tiny):
    """The loss and all gradients are finite; without noise the masks are random."""
    torch.manual_seed(1)
    out, other = (tiny(torch.zeros(4, 32, 48, 3, dtype=torch.uint8), [4]) for _ in range(2))
    assert not torch.equal(out.masked_ids, other.masked_ids)
    assert out.masked_ids.shape == (4, P - 1)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in tiny.parameters())


def test_mixed_precision_stays_close_and_keeps_the_loss_in_float32(tiny):
    exact = tiny(frames(4), [4], 0.5, noise(4))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tiny(frames(4), [4], 0.5, noise(4))
    assert rounded.loss.dtype == torch.float32
    assert rounded.pred.dtype == torch.bfloat16
    assert (rounded.loss - exact.loss).abs() / exact.loss < 1e-2


def test_intermediate_layers_as_in_dinov2(tiny):
    x = torch.randn(2, 3, 48, 80)
    features = tiny.forward_features(x)
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    cls = {"x_norm_clstoken": (2, 32), "x_norm_cls_token": (2, 32)}  # of DINOv2, of the released model
    assert shapes == cls | {"x_norm_patchtokens": (2, 15, 32), "x_prenorm": (2, 16, 32)}
    encoder = Encoder(tiny.config)
    encoder.load_state_dict({name: tiny.state_dict()[name] for name in encoder.state_dict()})
    assert torch.equal(encoder(x), features["x_norm_cls_token"])
    assert encoder(x, is_training=True).keys() == features.keys()
    assert (encoder.embed_dim, encoder.num_features, encoder.patch_size) == (32, 32, 16)
    assert (encoder.n_blocks, encoder.num_heads) == (2, 2)
    last = tiny.get_intermediate_layers(x)[0]
    assert torch.equal(last, features["x_norm_patchtokens"])
    (first, cls), (_, last_cls) = tiny.get_intermediate_layers(x, n=[0, 1], return_class_token=True)
    assert first.shape == (2, 15, 32)
    assert cls.shape == (2, 32)
    assert torch.equal(last_cls, features["x_norm_clstoken"])
    maps = tiny.get_intermediate_layers(x, n=2, reshape=True)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 3, 5)] * 2
    assert torch.equal(maps[1].flatten(2).transpose(1, 2), last)
    assert torch.equal(tiny.norm(tiny.get_intermediate_layers(x, norm=False)[0]), last)
    for n in (0, 3, [2], [-1], []):
        with pytest.raises(ValueError, match=r"n is .* 2 blocks"):
            tiny.get_intermediate_layers(x, n=n)


def test_initialisation_also_after_the_meta_device():
    torch.manual_seed(0)
    model = MuM(PRESETS["mum_tiny"])
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.startswith("patch_embed"):
            continue
        if name.endswith("token") or parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
        else:
            assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
    with torch.device("meta"):
        late = MuM(model.config)
    late.to_empty(device="cpu")
    torch.manual_seed(0)
    late.init_weights()
    torch.manual_seed(0)
    model.init_weights()
    torch.testing.assert_close(late.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_sizes_of_the_presets():
    with torch.device("meta"):
        models = [MuM(PRESETS[name]) for name in ("mum_vitl16", "mum_vitl16_released")]
    millions = [sum(p.numel() for p in model.parameters()) / 1e6 for model in models]
    assert millions == 2 * [pytest.approx(389.5, abs=0.05)]  # supplement, "Architecture"
    assert PRESETS["mum_vitl16"].decoder_num_heads == 12
    assert PRESETS["mum_vitl16_released"].decoder_num_heads == 16
    assert PRESETS["mum_vitb16"] == ModelConfig(768, 12, 12, 512, 8, 16)


def test_wrong_arguments_are_named(tiny):
    for change, error, words in [
        ({"frames": "x"}, TypeError, "frames is a str"),
        ({"frames": torch.zeros(2, 3, 32, 48, dtype=torch.int32)}, TypeError, "frames has dtype torch.int32"),
        ({"frames": torch.zeros(2, 4, 32, 48)}, ValueError, r"frames has shape \(2, 4, 32, 48\)"),
        ({"frames": torch.zeros(2, 3, 32, 48, dtype=torch.uint8)}, ValueError, r"frames has shape \(2, 3, 32, 48\)"),
        ({"frames": torch.zeros(2, 3, 30, 48)}, ValueError, "frames is 30 x 48"),
        ({"lengths": [1]}, ValueError, r"lengths is \[1\]"),
        ({"lengths": [2, 0]}, ValueError, r"lengths is \[2, 0\]"),
        ({"lengths": []}, ValueError, r"lengths is \[\]"),
        ({"lengths": torch.tensor([1.0, 1.0])}, TypeError, "lengths is a torch.float32 tensor"),
        ({"lengths": 2}, TypeError, "lengths is a int"),
        ({"lengths": None}, TypeError, "lengths is missing"),
        ({"lengths": [1.5, 0.5]}, TypeError, r"lengths is \[1.5, 0.5\]"),
        ({"lengths": torch.tensor([1, 0, 1])}, ValueError, "lengths"),
        ({"max_views": "2"}, TypeError, "max_views is '2'"),
        ({"max_views": 1}, ValueError, "max_views is 1, but a sequence has 2 frames"),
        ({"mask_ratio": 0.0}, ValueError, "mask_ratio is 0.0"),
        ({"mask_ratio": 0.99}, ValueError, "mask_ratio is 0.99"),
        ({"mask_ratio": 1.5}, ValueError, "mask_ratio is 1.5"),
        ({"noise": torch.rand(2, 5)}, ValueError, r"noise has shape \(2, 5\)"),
        ({"noise": torch.zeros(2, 6, dtype=torch.int64)}, TypeError, "noise has dtype torch.int64"),
    ]:
        with pytest.raises(error, match=words):
            tiny(**{"frames": frames(2), "lengths": [2], "mask_ratio": 0.5, "noise": None} | change)
    for change in (
        {"embed_dim": 30}, {"decoder_num_heads": 3}, {"decoder_depth": 3}, {"depth": 0}, {"num_heads": 2.0},
        {"norm_eps": 0.0}, {"norm_eps": None},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(change))}.* {next(iter(change.values()))}"):
            replace(tiny.config, **change)


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1, 1, 1], [4, 1]])
def test_segments_have_a_fixed_number_of_entries(lengths):
    segments = Segments.of_frames(torch.tensor(lengths), 5, queries=3, keys=7, longest=4)
    assert segments.cu_seqlens_q.dtype == torch.int32
    expected = torch.tensor([0, *lengths, *[0] * (5 - len(lengths))]).cumsum(0).int()
    assert torch.equal(segments.cu_seqlens_q, 3 * expected)
    assert torch.equal(segments.cu_seqlens_k, 7 * expected)
    assert segments[2:4] == (12, 28)
    assert segments.sizes.tolist() == [len(lengths), 3 * max(lengths), 7 * max(lengths)]


def test_the_last_block_computes_only_masked_patches(tiny):
    """Its MLP sees F * M tokens, all others every token."""
    seen = []
    for block in (*tiny.decoder_frame_blocks, *tiny.decoder_global_blocks):
        block.mlp.register_forward_hook(lambda _module, args, _out: seen.append(len(args[0])))
    tiny(frames(4), [4], 0.5, noise(4))
    assert seen == [4 * 7, 4 * 3]


def saved_bytes(function) -> tuple[torch.Tensor, int]:
    """The result of a function, and the bytes of the distinct tensors that it saves for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()
    return out, sum(sizes.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputation_changes_no_result_and_saves_less(tiny, autocast):
    saved, results = {}, {}
    for recompute in RECOMPUTE:
        tiny.set_recompute(recompute)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, saved[recompute] = saved_bytes(lambda: tiny(frames(6), [2, 4], 0.5, noise(6)).loss)
        results[recompute] = [loss, *torch.autograd.grad(loss, list(tiny.parameters()))]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results.values(), strict=True))
    # All save weights, and the stream between blocks.
    assert saved["mlp"] < 0.95 * saved["none"]
    assert saved["blocks"] < 0.6 * saved["none"]
    with pytest.raises(ValueError, match="recompute is 'all'"):
        tiny.set_recompute("all")


@pytest.mark.parametrize(("autocast", "compiled"), [(False, False), (True, False), (True, True)])
def test_frozen_parts(tiny, autocast, compiled):
    """A frozen encoder saves nothing; frozen decoder blocks save less, and change no other gradient."""
    run = torch.compile(tiny, fullgraph=True, backend="aot_eager") if compiled else tiny

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return run(frames(6), torch.tensor([2, 4]), 0.5, noise(6)).loss

    loss, everything = saved_bytes(step)
    full = dict(zip(dict(tiny.named_parameters()), torch.autograd.grad(loss, list(tiny.parameters())), strict=True))
    tiny.decoder_global_blocks.requires_grad_(False)
    for parameter in (p for name, p in tiny.named_parameters() if not name.startswith("decoder")):
        parameter.requires_grad_(False)
    if not compiled:
        pixels_and_ids = tiny._all_patches(frames(6), "frames")
        assert saved_bytes(lambda: tiny.encode(*pixels_and_ids))[1] == 0
    loss, some = saved_bytes(step)
    assert some < 0.7 * everything
    trained = {name: p for name, p in tiny.named_parameters() if p.requires_grad}
    for name, grad in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
        assert torch.equal(grad, full[name]), name
