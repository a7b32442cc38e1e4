"""The plain reference agrees with the released model and fastmum, and samples as the paper."""

from collections import Counter
from itertools import chain

import pytest
import torch
from released import TOLERANCE, difference

from benchmarks.reference import step as reference_step
from benchmarks.reference.model import ReferenceMuM
from benchmarks.reference.sampler import PaperSampler, Sequences
from fastmum import PRESETS, ModelConfig, MuM


def test_released_numbers(released):
    model = ReferenceMuM(**released.sizes, norm_eps=released.norm_eps)
    released.load_into(model)
    output = model(released.tensors["images"], released.config["mask_ratio"], released.tensors["mask_noise"])
    released.check(model, output.loss)
    assert difference(output.pred, released.tensors["pred"]) < TOLERANCE
    assert torch.equal(output.mask, released.tensors["mask"])


@pytest.mark.parametrize(("heads", "decoder_heads", "batch", "mask_ratio"), [(2, 4, (2, 3), 0.75), (4, 2, (1, 5), 0.5)])
def test_agrees_with_fastmum(heads, decoder_heads, batch, mask_ratio):
    torch.manual_seed(0)
    ours = MuM(ModelConfig(64, 2, heads, 32, 4, decoder_heads, norm_eps=1e-6))
    with torch.no_grad():
        for parameter in ours.parameters():  # so that errors in biases and norms show
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    reference = ReferenceMuM(64, 2, heads, 32, 4, decoder_heads, norm_eps=1e-6)
    reference.load_state_dict(ours.state_dict())
    (sequences, views), (height, width) = batch, (48, 64)
    frames = torch.randint(0, 256, (sequences, views, 3, height, width), dtype=torch.uint8)
    noise = torch.rand(sequences * views, height * width // 256)

    expected = reference(reference_step.normalise(frames), mask_ratio, noise)
    raw = frames.flatten(0, 1).permute(0, 2, 3, 1).contiguous()
    output = ours(raw, [views] * sequences, mask_ratio, noise)
    assert difference(output.loss, expected.loss) < TOLERANCE
    assert torch.equal(torch.zeros_like(expected.mask).scatter(1, output.masked_ids, 1.0), expected.mask)
    picked = expected.pred.gather(1, output.masked_ids[:, :, None].expand_as(output.pred))
    assert difference(output.pred, picked) < TOLERANCE
    gradients = torch.autograd.grad(output.loss, list(ours.parameters()))
    expected.loss.backward()
    by_name = dict(reference.named_parameters())
    for (key, _), gradient in zip(ours.named_parameters(), gradients, strict=True):
        assert difference(gradient, by_name[key].grad) < TOLERANCE, key


def test_default_sizes_are_the_released_models():
    with torch.device("meta"):
        ours, reference = MuM(PRESETS["mum_vitl16_released"]).state_dict(), ReferenceMuM().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in reference.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_learns_and_reports_its_loss_and_norm(precision):
    torch.manual_seed(0)
    model = ReferenceMuM(32, 2, 2, 32, 2, 2)
    optimizer = reference_step.build_optimizer(model, lr=1e-3)
    frames = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    noise = torch.rand(4, 4)
    loss = model(reference_step.normalise(frames), 0.75, noise).loss
    norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decay[id(p)] == (0.05 if p.ndim >= 2 else 0.0) for p in model.parameters())

    phases = []
    arguments = {"precision": precision, "lap": phases.append}
    steps = [reference_step.train_step(model, optimizer, frames, noise, **arguments) for _ in range(5)]
    assert steps[0] == pytest.approx((loss.item(), norm.item()), rel={"fp32": 1e-6, "bf16": 2e-2}[precision])
    assert steps[-1][0] < steps[0][0]
    assert phases == 5 * ["forward", "backward", "norm", "optimizer"]


LONG = Sequences(range(0, 300, 30), [30] * 10)
SHORT = Sequences([300, 304], [4, 26], weight=3.0)
IMAGES = range(1000, 1500)


def sampler(batches=400, **settings) -> PaperSampler:
    return PaperSampler([LONG, SHORT], IMAGES, batches, **settings)


def test_batches_are_whole_sequences_of_one_length_without_repetition():
    batches = list(sampler())
    assert len(batches) == len(sampler()) == 400
    sequences = [range(s, s + n) for d in (LONG, SHORT) for s, n in zip(d.starts, d.lengths, strict=True)]
    for batch in batches:
        (views,) = {len(sequence) for sequence in batch}
        assert len(batch) == 96 // views
        for sequence in batch:
            assert len(set(sequence)) == views
            assert any(set(sequence) <= set(frames) for frames in ([IMAGES] if views == 1 else sequences))
    for batch in sampler(batches=20, image_share=1.0):
        images = list(chain.from_iterable(batch))
        assert len(images) == len(set(images)) == 96
    assert list(sampler(5, seed=1)) == list(sampler(5, seed=1)) != list(sampler(5, seed=2))


def test_a_tenth_are_single_images_s_is_uniform_and_weights_hold():
    drawn = sampler()
    shapes = Counter(drawn.shape()[1] for _ in range(46_000))
    assert shapes.pop(1) / 46_000 == pytest.approx(0.1, abs=0.01)
    assert set(shapes) == set(range(2, 25))
    assert 0.85 * 1800 < min(shapes.values()) <= max(shapes.values()) < 1.15 * 1800  # 1,800 expected
    sequences = [drawn.sequence(2)[0] for _ in range(4000)]
    assert sum(frame >= 300 for frame in sequences) / 4000 == pytest.approx(0.75, abs=0.03)
