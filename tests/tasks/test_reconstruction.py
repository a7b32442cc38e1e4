"""Reconstruction: packed sequences, recomputation, chunks, precision, losses by hand, VGGT's layout of weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastmum.engine.distributed import DistContext
from fastmum.geometry.camera import quaternion as numpy_quaternion
from fastmum.geometry.camera import rigid_inverse, transform
from fastmum.geometry.camera import unproject as numpy_unproject
from fastmum.model.config import ModelConfig
from fastmum.tasks.reconstruction.aggregator import Sequences
from fastmum.tasks.reconstruction.block import Block
from fastmum.tasks.reconstruction.camera import decode_cameras, encode_cameras
from fastmum.tasks.reconstruction.convert import LayoutError, config_of, from_public, to_public
from fastmum.tasks.reconstruction.flops import frame_flops, square_flops
from fastmum.tasks.reconstruction.losses import (
    LossWeights,
    Prediction,
    Scene,
    camera_losses,
    losses_of,
    normalise_scenes,
    unproject,
)
from fastmum.tasks.reconstruction.model import Reconstruction, ReconstructionConfig
from fastmum.tasks.reconstruction.scores import Scores

CONFIG = ReconstructionConfig(
    encoder_dim=12, embed_dim=16, pairs=4, num_heads=2, registers=2, patch_size=4, taps=(0, 1, 2, 3), dpt_features=16,
    dpt_levels=(8, 8, 8, 8), camera_heads=4, camera_blocks=1, camera_iterations=2,
)  # fmt: skip
GRID = 2, 3
LENGTHS = [3, 1, 4]


def make_model(config: ReconstructionConfig = CONFIG) -> Reconstruction:
    """A model in which every parameter matters."""
    torch.manual_seed(0)
    model = Reconstruction(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return model


def tokens_of(frames: int) -> torch.Tensor:
    return torch.randn(frames, GRID[0] * GRID[1], CONFIG.encoder_dim, generator=torch.Generator().manual_seed(1))


def flat(prediction: Prediction) -> list[torch.Tensor]:
    return [*prediction.cameras, *(x for x in prediction[1:] if x is not None)]


def run(model: Reconstruction, tokens: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    return flat(model.predict(tokens, GRID, Sequences.of(lengths)))


def gradients(model: Reconstruction, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [*torch.autograd.grad(sum(x.square().sum() for x in outputs), parameters)]


def close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-12


def test_packed_sequences_equal_single_ones_with_their_gradients():
    model, tokens = make_model().double(), tokens_of(sum(LENGTHS)).double()
    single = [run(model, part, [len(part)]) for part in tokens.split(LENGTHS)]
    packed = run(model, tokens, LENGTHS)
    close(packed, [torch.cat(parts) for parts in zip(*single, strict=True)], 1e-6)
    close(gradients(model, packed), gradients(model, [x for part in single for x in part]), 1e-6)
    assert not torch.allclose(packed[0][:1], single[1][0])  # sequences differ


def test_recomputation_and_chunks_change_nothing():
    model, tokens = make_model(), tokens_of(sum(LENGTHS))
    outputs = run(model, tokens, LENGTHS)
    expected = gradients(model, outputs)
    model.set_recompute("all")
    model.depth_head.chunk = model.point_head.chunk = 3
    again = run(model, tokens, LENGTHS)
    close(again, outputs, 1e-5)
    close(gradients(model, again), expected, 1e-4)
    with pytest.raises(ValueError, match="blocks"):
        model.set_recompute("some")


def test_dense_heads_compute_selected_frames_only():
    model, tokens = make_model(), tokens_of(sum(LENGTHS))
    taps = model.aggregator(tokens, GRID, Sequences.of(LENGTHS), CONFIG.taps)
    whole = model.depth_head(taps, GRID, CONFIG.patch_size)
    part = model.depth_head(taps, GRID, CONFIG.patch_size, slice(1, 8, 3))
    close([*part], [x[1:8:3] for x in whole], 1e-5)


def test_under_autocast_heads_are_float32():
    model, tokens = make_model(), tokens_of(sum(LENGTHS))
    sequences = Sequences.of(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        *taps, last = model.aggregator(tokens, GRID, sequences, (*CONFIG.taps, 3))
        outputs = flat(model.predict(tokens, GRID, sequences))
    exact = run(model, tokens, LENGTHS)
    assert {x.dtype for x in outputs} == {torch.float32} == {last.across.dtype}
    # The heads of the tokens that were computed in bfloat16, without autocast: the same bits.
    heads = [*model.camera_head(last.select(tokens=slice(0, 1))[:, 0], sequences)]
    heads += model.depth_head(taps, GRID, CONFIG.patch_size)
    assert all(torch.equal(a, b) for a, b in zip(heads[2:], outputs[2:4], strict=True))
    assert torch.equal(heads[0], outputs[0])
    assert any(not torch.equal(a, b) for a, b in zip(outputs, exact, strict=True))


def make_scene(lengths: list[int], size: tuple[int, int] = (24, 30)) -> Scene:
    generator, frames = torch.Generator().manual_seed(2), sum(lengths)
    R = torch.linalg.qr(torch.randn(frames, 3, 3, generator=generator, dtype=torch.float64)).Q
    T = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    T[:, :3, :3] = R * torch.linalg.det(R)[:, None, None]
    T[:, :3, 3] = torch.randn(frames, 3, generator=generator)
    K = torch.tensor([[40.0, 0, 15], [0, 35, 12], [0, 0, 1]], dtype=torch.float64).repeat(frames, 1, 1)
    points = torch.randn(frames, *size, 3, generator=generator, dtype=torch.float64) + 3
    valid = torch.rand(frames, *size, generator=generator) > 0.3
    return Scene(T, K, points[..., 2], points, valid)


def predicted(scene: Scene, iterations: int = 2) -> Prediction:
    generator, frames = torch.Generator().manual_seed(3), len(scene.K)
    cameras = [torch.randn(frames, 9, generator=generator).double() for _ in range(iterations)]
    noise = torch.randn(*scene.points.shape, generator=generator)
    confidence = 1 + torch.rand(2, *scene.depth.shape, generator=generator).double()
    return Prediction(cameras, scene.depth + noise[..., 0], confidence[0], scene.points + noise, confidence[1])


def test_scenes_are_normalised_one_by_one_and_lose_scale_and_frame():
    scene, sequences = make_scene(LENGTHS), Sequences.of(LENGTHS)
    found = normalise_scenes(scene, sequences)
    firsts = found.camera_from_world[sequences.firsts]
    assert torch.allclose(firsts, torch.eye(4).double().expand_as(firsts), atol=1e-9)
    for part, mask in zip(found.points.split(LENGTHS), found.valid.split(LENGTHS), strict=True):
        assert part[mask].norm(dim=-1).mean() == pytest.approx(1, rel=1e-5)
    # Another world frame and unit gives the same scene, and so do sequences alone.
    turn = make_scene([1]).camera_from_world[0]
    T = scene.camera_from_world @ torch.linalg.inv(turn)
    T[:, :3, 3] *= 7
    moved = Scene(T, scene.K, 7 * scene.depth, 7 * (scene.points @ turn[:3, :3].T + turn[:3, 3]), scene.valid)
    close([*normalise_scenes(moved, sequences)[:4]], [*found[:4]], 1e-6)
    parts = [Scene(*each) for each in zip(*(x.split(LENGTHS) for x in scene), strict=True)]
    alone = [normalise_scenes(part, Sequences.of([n])) for part, n in zip(parts, LENGTHS, strict=True)]
    close([torch.cat(x) for x in list(zip(*alone, strict=True))[:4]], [*found[:4]], 1e-9)


def test_camera_loss_counts_frames_of_sequences_whose_first_frame_is_seen():
    scene, sequences = make_scene(LENGTHS), Sequences.of(LENGTHS)
    valid = scene.valid.clone()
    valid[0] = False  # the first sequence
    target = encode_cameras(scene.camera_from_world, scene.K, (24, 30))
    predictions = predicted(scene).cameras
    for kind, function in (("l1", F.l1_loss), ("huber", lambda a, b: F.huber_loss(a, b, delta=0.5))):
        found = camera_losses(predictions, target, valid, sequences, kind, 0.5)
        for name, part in (("translation", slice(0, 3)), ("rotation", slice(3, 7)), ("fov", slice(7, 9))):
            terms = [function(p[3:, part], target[3:, part]) for p in predictions]
            assert found[name].item() == pytest.approx(((0.6 * terms[0] + terms[1]) / 2).item())
    nothing = camera_losses(predictions, target, torch.zeros_like(valid), sequences)
    assert all(loss == 0 for loss in nothing.values())


def test_losses_ignore_invalid_pixels_and_survive_what_is_not_finite():
    scene, sequences = make_scene(LENGTHS), Sequences.of(LENGTHS)
    prediction = predicted(scene)
    expected = losses_of(prediction, scene, sequences, LossWeights())
    garbage = torch.where(scene.valid, 0, torch.nan)
    changed = scene._replace(depth=scene.depth + garbage, points=scene.points + garbage[..., None])
    leaves = [x.requires_grad_() for x in flat(prediction)]
    found = losses_of(prediction, changed, sequences, LossWeights())
    close([*found.values()], [*expected.values()], 1e-9)
    found["objective"].backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert not prediction.depth.grad[~scene.valid].any()


def test_losses_never_wait_for_the_device():
    """No operator whose result has a shape, or is a number, that the host must know."""
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    scene, sequences, model = make_scene([2, 1]), Sequences.of([2, 1]), make_model().double()
    tokens = tokens_of(3).double()
    scene = scene._replace(**{name: getattr(scene, name)[:, :8, :12] for name in ("depth", "points", "valid")})
    with Recorder():
        prediction = model.predict(tokens, GRID, sequences)
        losses_of(prediction, normalise_scenes(scene, sequences), sequences, LossWeights())["objective"].backward()
    assert {"topk", "convolution"} <= {*names}
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item", "unique"}
    assert not waiting & {*names}


def test_encoded_cameras_decode_to_themselves():
    scene = make_scene([5])
    K = scene.K.clone()
    encoded = encode_cameras(scene.camera_from_world, K, (24, 30))
    quaternions = numpy_quaternion(scene.camera_from_world[:, :3, :3].numpy())[:, [1, 2, 3, 0]]
    assert np.allclose(encoded[:, 3:7], quaternions * np.sign(quaternions[:, 3:]))
    T, found = decode_cameras(encoded, (24, 30))
    assert torch.allclose(T, scene.camera_from_world)
    assert torch.allclose(found, K)  # the principal point is the centre


def test_layout_of_a_public_checkpoint():
    model = make_model()
    public = to_public(model.state_dict())
    encoder = {"patch_embed.proj.weight": torch.zeros(12, 3, 4, 4), "blocks.0.norm1.weight": torch.ones(12)}
    public |= {f"aggregator.patch_embed.{name}": x for name, x in encoder.items()}
    public["track_head.token"] = torch.zeros(1)
    assert config_of(public) == ReconstructionConfig(**{**vars(CONFIG), "camera_heads": 16, "camera_iterations": 4})
    ours, rest = from_public(public)
    assert rest.keys() == encoder.keys()
    Reconstruction(CONFIG).load_state_dict(ours)
    assert config_of(public, camera_heads=2, taps=(0, 0, 1, 1)).taps == (0, 0, 1, 1)
    with pytest.raises(LayoutError, match="heads"):
        config_of(public, camera_heads=7)
    del public["aggregator.camera_token"]
    with pytest.raises(LayoutError, match="camera_token"):
        config_of(public)


def test_sizes_that_do_not_fit_are_named():
    for change in ({"taps": (0, 1, 2, 6)}, {"embed_dim": 1000}, {"pairs": 0}, {"dpt_levels": (8, 8, 8, 6)}):
        with pytest.raises(ValueError, match=next(iter(change))):
            ReconstructionConfig(**change)


def test_world_points_of_depth_maps():
    scene = make_scene([2])
    K = scene.K + torch.tensor([[0, 0.7, 0.3], [0, 0, -0.2], [0, 0, 0]])
    points = unproject(scene.depth, K, scene.camera_from_world)
    for depth, k, T, found in zip(scene.depth, K, scene.camera_from_world, points, strict=True):
        expected = transform(rigid_inverse(T.numpy()), numpy_unproject(depth.numpy(), k.numpy()))
        assert np.allclose(found, expected)


def test_scores_of_the_truth_are_perfect_and_of_others_lower():
    scene, sequences = make_scene([4, 3]), Sequences.of([4, 3])
    truth = normalise_scenes(scene, sequences)
    cameras = encode_cameras(truth.camera_from_world, truth.K, (24, 30))
    depth = truth.depth.clamp(min=0.1)
    truth = truth._replace(depth=depth)

    def scored(cameras: torch.Tensor, factor: float) -> dict[str, float]:
        scores = Scores(DistContext(), 0.8)
        scores.add(Prediction([cameras], factor * depth, depth, None, None), truth, [4, 3], torch.tensor(2.0))
        return scores.compute()

    trivial = ((0.8 - depth[truth.valid]).abs() / depth[truth.valid]).mean().item()
    expected = {"held_out_loss": 2, "auc30": 1, "abs_rel": 0, "abs_rel_of_mean_depth": trivial}
    assert scored(cameras, 1.0) == pytest.approx(expected, abs=1e-6)
    worse = scored(torch.cat([cameras[:, :3], cameras[:, 3:7].roll(1, 1), cameras[:, 7:]], 1), 1.5)
    assert worse["abs_rel"] == pytest.approx(0.5)
    assert worse["auc30"] < 0.5


def test_operations_are_those_that_torch_counts():
    grid, frames = GRID, 3
    model = make_model()
    encoder = ModelConfig(CONFIG.encoder_dim, 1, 1, 12, 2, 1, patch_size=CONFIG.patch_size)
    with FlopCounterMode(display=False) as counter:
        model.predict(tokens_of(frames), grid, Sequences.of([frames]))
    without = frame_flops(CONFIG, grid, encoder, False) - frame_flops(CONFIG, grid, encoder, True)
    per_frame = frame_flops(CONFIG, grid, encoder, False) + without / 2  # the encoder is 1 or 3 times its forward pass
    # torch does not count attention on the CPU.
    attention = 3 * CONFIG.pairs * 4 * (3 + GRID[0] * GRID[1]) ** 2 * CONFIG.embed_dim
    assert frames * (per_frame - attention) == 3 * counter.get_total_flops()
    assert square_flops(CONFIG, grid, [2, 3]) == attention * (4 + 9)


@pytest.mark.slow
def test_blocks_compile_once_for_batches_of_any_size():
    model, graphs = make_model(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compute = torch.compile(Block._compute, fullgraph=True, dynamic=True, backend=backend)
    counts = []
    for lengths, grid in (([3, 1, 4], (2, 3)), ([2, 2], (3, 4)), ([5], (2, 5)), ([1, 1, 2], (4, 2)), ([6], (3, 3))):
        tokens = torch.randn(sum(lengths), grid[0] * grid[1], CONFIG.encoder_dim)
        results = []
        for compiled in (None, compute):
            for block in (*model.aggregator.frame_blocks, *model.aggregator.global_blocks):
                block.compiled_compute = compiled
            outputs = flat(model.predict(tokens, grid, Sequences.of(lengths), 6))
            results.append(outputs + gradients(model, outputs))
        close(results[1], results[0], 1e-5)
        counts.append(len(graphs))
    assert counts[-1] == counts[2], counts
    assert counts[-1] <= 6
