"""RoMa: true warps by hand, augmentation, sampling of pairs, losses without overlap, layers, matching, its samples."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plane_world import exact, shot
from torch.utils.flop_counter import FlopCounterMode

from fastmum.data.errors import DataError
from fastmum.data.pair_loader import FILL, mirrored, shifted
from fastmum.engine.distributed import DistContext
from fastmum.geometry import View
from fastmum.model.config import ModelConfig
from fastmum.model.encoder import Encoder
from fastmum.pretrained.layout import WeightsError
from fastmum.tasks.roma.coarse import grid
from fastmum.tasks.roma.data import RomaPlanner
from fastmum.tasks.roma.decoder import STRIDES, ScaleOutput
from fastmum.tasks.roma.depthwise import DepthwiseConv
from fastmum.tasks.roma.infer import Trained, Warps, correspondences, fine_size, match, pixels, sample
from fastmum.tasks.roma.losses import TrueWarp, losses_of, true_warps
from fastmum.tasks.roma.model import Roma, RomaConfig, pair_flops, sides
from fastmum.tasks.roma.scores import Scores
from fastmum.tasks.roma.vgg import Vgg

SIZES = RomaConfig(
    encoder_dim=32, vgg=(4, 6, 8, 8), vgg_layers=(1, 1, 1, 1), projected=(8, 8, 8, 4, 4), displacement=(4, 4, 4, 2, 2),
    radius=(2, 1, 1, 0, 0), gp_dim=8, num_heads=2, blocks=1, anchors=4, hidden_blocks=1,
)  # fmt: skip
ENCODER = ModelConfig(32, 1, 2, 16, 2, 1)


def make_model() -> Roma:
    torch.manual_seed(0)
    return Roma(SIZES, Encoder(ENCODER).requires_grad_(False))


def view_of(shot) -> View:
    return View(np.asarray(shot.image()), shot.frame().read_camera(), shot.depth())


def warp_of(a: View, b: View) -> TrueWarp:
    """From all pixels of a."""
    maps = [torch.from_numpy(np.ascontiguousarray(view.depth))[None] for view in (a, b)]
    Ks = [torch.from_numpy(view.camera.K)[None] for view in (a, b)]
    T = b.camera.camera_from_world @ np.linalg.inv(a.camera.camera_from_world)
    return true_warps(*maps, *Ks, torch.from_numpy(T)[None], [a.depth.shape])[0]


def test_true_warps_of_a_wall_and_of_augmented_views():
    one, other = shot(), shot((0.3, -0.1, 0.2), (0.03, -0.05, 0.1))
    a, b = view_of(one), view_of(other)
    found = warp_of(a, b)
    points = ((grid((48, 64))[0].flatten(1).T.double() + 1) / 2).numpy()
    expected = torch.from_numpy(2 * exact(one, other, points) - 1).T.view(2, 48, 64)
    seen = found.visible[0]
    assert seen.float().mean() > 0.5
    assert (found.points[0] - expected)[:, seen].abs().max() < 1e-4
    # The pixel (x, y) of A moves by the shift and is then mirrored, as its match in B.
    right, down = 5, -3
    moved = warp_of(*(mirrored(shifted(view, right, down)) for view in (a, b)))
    pixel = torch.tensor([2 * right / 64, 2 * down / 48])
    expected = torch.stack([-(found.points[0, 0] + pixel[0]), found.points[0, 1] + pixel[1]])
    expected = expected.roll((down, right), (1, 2)).flip(2)
    both = moved.visible[0] & seen.roll((down, right), (0, 1)).flip(1)
    assert both.float().mean() > 0.4
    assert (moved.points[0] - expected)[:, both].abs().max() < 1e-4
    image = shifted(a, right, down).image
    assert (image[:, :right] == FILL).all()
    assert np.array_equal(image[:down, right:], a.image[-down:, :-right])


def outputs_of(side: int = 32, flows=None) -> dict[int, ScaleOutput]:
    torch.manual_seed(1)
    found = {}
    for stride in STRIDES:
        shape = 2, 2, side // stride, side // stride
        flow = torch.randn(shape, requires_grad=True) if flows is None else flows[stride]
        certainty = torch.randn(2, 1, *shape[2:], requires_grad=True)
        coarse = (torch.randn(2, 16, *shape[2:], requires_grad=True), certainty) if stride == 16 else (None, None)
        found[stride] = ScaleOutput(flow, certainty, flow, *coarse)
    return found


@pytest.mark.parametrize("depth", [0.0, 3.0])
def test_a_pair_without_overlap_trains_certainties_only(depth):
    """Without depth, or behind each other's back."""
    maps, K = torch.full((2, 32, 32), depth), torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).expand(2, 3, 3)
    T = torch.diag(torch.tensor([-1.0, 1, -1, 1])).expand(2, 4, 4)
    outputs = outputs_of()
    truth = true_warps(maps, maps, K, K, T, [out.flow.shape[2:] for out in outputs.values()])
    assert not any(warp.visible.any() for warp in truth)
    losses = losses_of(outputs, truth)
    assert losses["anchors_16"] == losses["regression_1"] == losses["pck"] == 0
    losses["objective"].backward()
    assert all(out.certainty.grad.isfinite().all() and out.certainty.grad.any() for out in outputs.values())
    assert not any(out.flow.grad.any() for out in outputs.values())
    scores = Scores(DistContext())
    scores.add(outputs, truth)
    found = scores.compute()
    assert "epe" not in found
    assert np.isfinite(found["held_out_loss"])


def test_scores_of_the_truth_and_of_a_shift():
    flows = {stride: grid((32 // stride, 32 // stride)).expand(2, -1, -1, -1) for stride in STRIDES}
    truth = [TrueWarp(flow, torch.ones(2, *flow.shape[2:], dtype=torch.bool)) for flow in flows.values()]
    for shift, epe, pck3 in ((0.0, 0.0, 1.0), (0.25, 4.0, 0.0)):
        scores = Scores(DistContext())
        scores.add(outputs_of(flows={s: f + torch.tensor([shift, 0])[:, None, None] for s, f in flows.items()}), truth)
        found = scores.compute()
        assert found["epe"] == pytest.approx(epe, abs=1e-5)
        assert found["pck3"] == pck3


def table_planner(rows, overlaps, scenes, weights=None, **options) -> RomaPlanner:
    """A planner over manifests in memory: `scenes` sequences of 10 frames, with `weights` each a data set."""
    names = [*weights] if weights else ["set"]
    manifests = SimpleNamespace(
        datasets=names, num_sequences=scenes, num_frames=10 * scenes, starts=np.arange(0, 10 * scenes + 1, 10),
        dataset_of=np.arange(scenes) % len(names), parts=[], present=lambda name: np.ones(10 * scenes, bool),
        scene_names=lambda numbers: [f"scene{i}" for i in numbers],
        sequence_of=lambda rows: np.asarray(rows) // 10,
    )  # fmt: skip
    table = SimpleNamespace(rows=np.array(rows), overlap=np.array(overlaps))
    options = {"second_overlap": 0.35, "shift": 8, "flip": True} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastmum.data.pair_plan.pair_table", lambda *_: table)
        return RomaPlanner(manifests, weights or {}, 4, (64, 64), 0, 2, sampling="overlap", depth=True, **options)


def test_rounds_hold_every_listed_pair_once_and_weights_follow_the_size_of_scenes(monkeypatch):
    rows = [(0, i) for i in range(1, 10)] + [(10, 11)]
    overlap = [0.1] * 6 + [0.5] * 3 + [0.2]  # scene 0: lists of 9 and of 3; scene 1: of 1
    planner = table_planner(rows, overlap, 2, overlap=(0.05, 1.0))
    assert sorted(planner._sets[0][1]) == pytest.approx(sorted([9**-0.75] * 9 + [3**-0.75] * 3 + [1.0]))
    drawn = np.concatenate([planner.plan(step, rank).rows for step in range(13) for rank in range(2)]).reshape(-1, 2)
    for start in range(0, 104, 13):  # a round has 13 pairs
        found = np.sort(drawn[start : start + 13], 1).tolist()
        assert sorted(found) == sorted([*map(list, rows), *([0, i] for i in (7, 8, 9))])
    again = planner.plan(7, 1)
    assert all(np.array_equal(x, y) for x, y in zip(again, planner.plan(7, 1), strict=True))
    assert again.shift.min() >= -8
    assert again.shift.max() <= 8
    plain = table_planner(rows, overlap, 2, overlap=(0.05, 1.0), augment=False).plan(0)
    assert not plain.shift.any()
    assert not plain.flip.any()
    with pytest.raises(DataError, match="overlap"):
        table_planner(rows, overlap, 2, overlap=(0.9, 1.0))
    monkeypatch.setattr("fastmum.tasks.roma.data.ROUND", 3)  # of 13: the pair of the small scene comes most often
    planner = table_planner(rows, overlap, 2, overlap=(0.05, 1.0))
    drawn = np.concatenate([planner.plan(step, rank).rows for step in range(60) for rank in range(2)]).reshape(-1, 2)
    share = (drawn.min(1) == 10).mean()
    assert 2 * share > (drawn.min(1) == 0).mean() / 9


def test_shares_of_data_sets_follow_their_weights_whatever_their_sizes(monkeypatch):
    monkeypatch.setattr("fastmum.tasks.roma.data.BLOCK", 100)
    rows = [(0, i) for i in range(1, 10)] + [(10, 11), (10, 12), (20, 21)]
    planner = table_planner(rows, [0.2] * 12, 3, {"a": 1.0, "b": 3.0, "c": 0.0}, overlap=(0.05, 1.0))
    drawn = np.concatenate([planner.plan(step, rank).rows for step in range(50) for rank in range(2)]).reshape(-1, 2)
    drawn = np.sort(drawn, 1)
    for block in np.split(drawn, 4):
        assert (block[:, 0] == 10).sum() == 75
        assert not (block[:, 0] == 20).any()
    for rows_of in (
        drawn[drawn[:, 0] == 0][:99],
        drawn[drawn[:, 0] == 10],
    ):  # rounds of 9 and 2 pairs without replacement
        counts = np.unique(rows_of[:, 1], return_counts=True)[1]
        assert counts.min() == counts.max()


@pytest.mark.parametrize(("size", "dtype"), [((2, 6, 14, 14), torch.float32), ((1, 5, 9, 31), torch.float32),
                                             ((2, 3, 20, 17), torch.bfloat16)])  # fmt: skip
def test_depthwise_gradients_are_those_of_a_convolution(size, dtype):
    torch.manual_seed(0)
    conv = DepthwiseConv(size[1], size[1], 5)
    x = torch.randn(size).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(size).to(dtype)
    found = torch.autograd.grad((conv(x) * weight).float().sum(), [x, *conv.parameters()])
    exact = conv.double()
    y = x.detach().double().requires_grad_()
    z = F.conv2d(y, exact.weight, exact.bias, padding=2, groups=size[1])
    expected = torch.autograd.grad((z * weight.double()).sum(), [y, *exact.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2) * b.abs().max()


def test_fine_encoder_reads_torchvisions_layout(tmp_path):
    torch.manual_seed(0)
    model, other = Vgg((4, 6, 8, 8)), Vgg((4, 6, 8, 8))
    convolutions = [i for i, layer in enumerate(model.layers) if isinstance(layer, torch.nn.Conv2d)]
    assert convolutions == [0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36]  # of vgg19_bn
    state = {f"features.{name.removeprefix('layers.')}": x for name, x in other.state_dict().items()}
    torch.save(state | {"features.40.weight": torch.zeros(1), "classifier.0.bias": torch.zeros(1)}, tmp_path / "a.pth")
    model.load(tmp_path / "a.pth")
    maps, expected = (each.eval()(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
                      for each in (model, other))  # fmt: skip
    assert [(stride, x.shape[1], x.shape[2]) for stride, x in maps.items()] == [
        (1, 4, 32), (2, 6, 16), (4, 8, 8), (8, 8, 4)
    ]  # fmt: skip
    assert all(torch.equal(maps[s], expected[s]) for s in maps)
    del state["features.3.bias"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"b\.pth"):
        model.load(tmp_path / "b.pth")


def test_the_encoder_stays_frozen_and_directions_are_independent():
    model = make_model().train()
    assert not model.encoder.training
    assert model.decoder.training
    model.eval()
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    both, forth = model.decoder(*sides(model.maps(images), both=True)), model(images)
    back = model(torch.cat([images[2:], images[:2]]))
    for stride in STRIDES:
        expected = torch.cat([forth[stride].flow, back[stride].flow])
        assert (both[stride].flow - expected).abs().max() < 1e-4
    loss = sum(out.flow.square().sum() + out.certainty.sum() for out in model.train()(images).values())
    loss.backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.cnn.parameters())


def trained() -> Trained:
    return Trained(make_model().eval().requires_grad_(False), "run", 1, None, 64, {})


def test_matching_of_images_of_any_sizes_and_of_black_ones():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((50, 90), (120, 70)))
    run = trained()
    for images in ((a, b), (0 * a, b), (0 * a, 0 * b)):
        for fine, side in ((False, 64), (True, fine_size(64))):
            warps = match(run, *images, fine=fine)
            assert warps.points.shape == (2, side, side, 2)
            assert warps.points.isfinite().all()
            assert warps.points.abs().max() <= 1
            assert warps.certainty.min() >= 0
            assert warps.certainty.max() <= 1
    assert fine_size(560) == 864
    swapped, warps = match(run, b, a), match(run, a, b)
    assert (swapped.points.flip(0) - warps.points).abs().max() < 1e-4


def test_samples_follow_certainty_and_density():
    H = W = 24
    points = grid((H, W))[0].permute(1, 2, 0).expand(2, -1, -1, -1).clone()
    certainty = torch.zeros(2, H, W)
    generator = torch.Generator().manual_seed(0)
    assert len(sample(Warps(points, certainty), 10, generator)[0]) == 0
    certainty[0, :, : W // 2] = 0.5
    warps = Warps(points, certainty)
    matches, found = sample(warps, 100, generator)
    assert matches.shape == (100, 4)
    assert (matches[:, 0] < 0).all()  # the left half
    assert (found == 0.5).all()
    assert len({tuple(row) for row in matches.tolist()}) == 100  # without replacement
    every, _ = correspondences(warps)
    assert every.shape == (2 * H * W, 4)
    assert torch.allclose(every[: H * W, :2], every[: H * W, 2:])
    assert pixels(torch.tensor([[-1.0, -1.0], [0.0, 1.0]]), (90, 50)).tolist() == [[0, 0], [45, 50]]


def test_operations_are_those_that_torch_counts():
    model = make_model().eval()
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        maps = model.maps(images, coarse=False)
        tokens = torch.randn(2, SIZES.encoder_dim, 4, 4)
        model.decoder(*({s: x[i : i + 1] for s, x in (maps | {16: tokens}).items()} for i in range(2)))
    P, E = 16, ENCODER.embed_dim
    encoding = 2 * (2 * P * 12 * E * E + 4 * P * P * E + 2 * P * 3 * 16**2 * E)  # 12 = 4 + 2 * 4, of a block
    assert pair_flops(SIZES, ENCODER, 64) == pytest.approx(3 * counter.get_total_flops() + encoding)
