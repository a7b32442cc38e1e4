"""Relative pose: nearest rotations, pairs in a batch, recomputation, precision, initial weights, operations, scores."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastmum.model.config import ModelConfig
from fastmum.model.encoder import Encoder
from fastmum.tasks.pose.convert import LayoutError, config_of, from_public, to_public
from fastmum.tasks.pose.losses import pose_errors, true_poses
from fastmum.tasks.pose.model import Block, PoseConfig, Poses, RelativePose, frame_flops
from fastmum.tasks.pose.pictures import epipolar_lines
from fastmum.tasks.pose.rotation import nearest_rotation
from fastmum.tasks.pose.scores import errors_of, scores_of

SIZES = ModelConfig(16, 2, 2, 16, 2, 2, patch_size=4)
CONFIG = PoseConfig(encoder_dim=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, head_dim=64)
GRID = 2, 3


def make_model(encoder: bool = False) -> RelativePose:
    """A model in which every parameter matters."""
    torch.manual_seed(0)
    model = RelativePose(CONFIG, Encoder(SIZES) if encoder else None)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return model


def tokens_of(pairs: int) -> torch.Tensor:
    return torch.randn(2 * pairs, GRID[0] * GRID[1], 16, generator=torch.Generator().manual_seed(1))


def cameras(frames: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    T = np.tile(np.eye(4), (frames, 1, 1))
    T[:, :3, :3], T[:, :3, 3] = Rotation.random(frames, random_state=0).as_matrix(), rng.normal(size=(frames, 3))
    return torch.from_numpy(T)


def run(model: RelativePose, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Poses and gradients of a function of them."""
    found = model.predict(tokens, GRID)
    weights = torch.linspace(-1, 1, found.R.numel()).view_as(found.R)
    loss = (found.R * weights).sum() + found.t.square().sum()
    named = [p for p in model.parameters() if p.requires_grad]
    return [*found, *torch.autograd.grad(loss, named, allow_unused=True)]


def close(found, expected, tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-12


def by_svd(m: torch.Tensor) -> torch.Tensor:
    """The public formula."""
    U, _, Vh = torch.linalg.svd(m.mT)
    V = Vh.mT
    signs = torch.linalg.det(V @ U.mT)
    diagonal = torch.diag_embed(torch.stack([torch.ones_like(signs), torch.ones_like(signs), signs], -1))
    return V @ diagonal @ U.mT


def test_nearest_rotations_and_gradients_are_those_of_the_svd():
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(200, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(200, 3, 3, generator=generator, dtype=torch.float64)
    R, expected = nearest_rotation(m), by_svd(m)
    assert (torch.linalg.det(m) < 0).any()
    assert torch.allclose(R, expected, atol=1e-9)
    assert torch.allclose(torch.linalg.det(R), torch.ones(200).double())
    (found,), (true,) = (torch.autograd.grad((x * weights).sum(), m) for x in (R, expected))
    assert torch.allclose(found, true, rtol=1e-5, atol=1e-6)
    # Equal singular values: the gradient of the SVD is not finite.
    turn = torch.from_numpy(Rotation.random(4, random_state=1).as_matrix()).requires_grad_()
    again = nearest_rotation(turn)
    assert torch.allclose(again, turn, atol=1e-12)
    assert torch.autograd.gradcheck(nearest_rotation, turn)
    generator = torch.Generator().manual_seed(0)
    column, row = (torch.randn(100, *shape, generator=generator) for shape in ((3, 1), (1, 3)))
    improper = -torch.from_numpy(Rotation.random(100, random_state=2).as_matrix()).float()
    for degenerate in (torch.zeros(1, 3, 3), torch.ones(1, 3, 3), -torch.eye(3)[None], column @ row, improper):
        degenerate.requires_grad_()
        R = nearest_rotation(degenerate)
        assert torch.allclose(R @ R.mT, torch.eye(3), atol=1e-5)
        (gradient,) = torch.autograd.grad(R.sum(), degenerate)
        assert gradient.isfinite().all()


def test_pairs_are_independent_and_views_are_symmetric():
    model, tokens = make_model().double(), tokens_of(3).double()
    packed = model.predict(tokens, GRID)
    single = [model.predict(part, GRID) for part in tokens.split(2)]
    close(packed, [torch.cat(each) for each in zip(*single, strict=True)], 1e-9)
    swapped = model.predict(tokens.view(3, 2, -1, 16).flip(1).flatten(0, 1), GRID)
    close(swapped, [x.view(3, 2, *x.shape[1:]).flip(1).flatten(0, 1) for x in packed], 1e-9)
    other = tokens.clone()
    other[1] += 1
    assert (model.predict(other, GRID).R[0] - packed.R[0]).abs().max() > 1e-6, "a view depends on the other one"


def test_recomputation_changes_nothing_and_reaches_the_encoder():
    model = make_model(encoder=True)
    images = torch.randint(0, 256, (4, 8, 12, 3), dtype=torch.uint8)

    def outputs():
        found = model(images)
        return [
            *found,
            *torch.autograd.grad(found.R[:, 0].sum() + found.t.sum(), [*model.parameters()], allow_unused=True),
        ]

    expected = outputs()
    for what in ("mlp", "blocks"):
        model.set_recompute(what)
        close(outputs(), expected, 1e-4)
    assert (model.encoder.recompute, model.decoder.recompute) == ("blocks", "blocks")
    with pytest.raises(ValueError, match="recompute"):
        model.set_recompute("some")


def test_images_are_normalised_by_half_unless_asked():
    images = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    model = make_model(encoder=True)
    own = Encoder(SIZES)
    own.load_state_dict(model.encoder.state_dict())
    (expected,) = own.tokens((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5, norm=True)
    (found,) = model.encoder.tokens(images, norm=True)
    assert torch.allclose(found.patch, expected.patch, atol=1e-5)
    kept = RelativePose(CONFIG, own, half=False)
    assert kept.encoder.mean == own.options.mean != (0.5, 0.5, 0.5)


def test_under_autocast_the_head_is_float32():
    model, tokens = make_model(), tokens_of(2)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = model.decoder(tokens, GRID)
        found = model.predict(tokens, GRID)
    assert {x.dtype for x in found} == {torch.float32}
    assert torch.equal(model.head(decoded)[0], found.t)
    exact = model.predict(tokens, GRID)
    assert 0 < (found.t - exact.t).abs().max() < 0.1 * exact.t.abs().max()


def test_a_step_never_waits_for_the_device():
    """No operator whose result has a shape, or is a number, that the host must know, and no decomposition."""
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model, tokens, T = make_model(), tokens_of(2), cameras(4).float()
    with Recorder():
        rotation, direction = pose_errors(model.predict(tokens, GRID), true_poses(T))
        (rotation + direction).sum().backward()
    assert {"linalg_inv_ex", "acos"} <= {*names}
    waiting = {
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "equal",
        "item",
        "_linalg_svd",
        "_linalg_eigh",
        "_linalg_det",
    }
    assert not waiting & {*names}


def test_true_poses_and_errors_by_hand():
    T = cameras(4)
    true = true_poses(T)
    for a, b in ((0, 1), (1, 0), (2, 3), (3, 2)):
        other_from_own = T[b] @ torch.linalg.inv(T[a])
        assert torch.allclose(true.R[a], other_from_own[:3, :3])
        assert torch.allclose(true.t[a], other_from_own[:3, 3])
    turn = torch.from_numpy(Rotation.from_rotvec([0, 0, 0.3]).as_matrix())
    rotation, direction = pose_errors(Poses(true.R @ turn, 5 * true.t), true)
    assert torch.allclose(rotation, torch.tensor(0.3).double())
    assert direction.max() < 2e-3, "any length, and the bound of the cosine"
    rotation, direction = pose_errors(Poses(true.R, -true.t), true)
    assert torch.allclose(direction, torch.tensor(math.pi).double(), atol=3e-3), "not folded"
    zero = torch.zeros_like(true.t).requires_grad_()
    _, direction = pose_errors(Poses(true.R, zero), true)
    direction.sum().backward()
    assert zero.grad.isfinite().all()


def test_initial_weights_are_xavier_but_for_the_convolutions():
    torch.manual_seed(0)
    model = RelativePose(PoseConfig(64, 16, 96, 1, 2, 1024))
    block = model.decoder.blocks[0]
    for weight, fans in (
        (block.attn.qkv.weight, 96 + 288), (block.cross_attn.kv.weight, 96 + 96), (model.decoder.embed.weight, 64 + 96),
        (model.head.rotation.weight, 1024 + 9), (model.head.fc1.weight, 2048),
    ):  # fmt: skip
        bound = math.sqrt(6 / fans)
        assert 0.97 * bound < weight.abs().max() <= bound
    assert not block.attn.qkv.bias.any()
    convolution = model.head.residual[1][2]
    assert convolution.weight.abs().max() <= 1 / 32
    assert convolution.bias.any()


def test_layout_of_a_public_checkpoint():
    model = make_model()
    public = to_public(model.state_dict(), CONFIG) | {"enc_norm.weight": torch.ones(16)}
    assert public["pose_head.res_conv.0.res_conv1.weight"].shape == (64, 64, 1, 1)
    assert config_of(public, 2) == CONFIG
    ours = from_public(public, CONFIG)
    missing = {name for name, _ in model.named_parameters()} ^ ours.keys()
    assert not missing
    assert all(torch.equal(model.get_parameter(name), value) for name, value in ours.items())
    del public["dec_norm.bias"]
    with pytest.raises(LayoutError, match=r"dec_norm\.bias"):
        from_public(public, CONFIG)
    with pytest.raises(LayoutError, match="decoder_embed"):
        config_of({})


def test_sizes_that_do_not_fit_are_named():
    for change in ({"embed_dim": 1000}, {"depth": 0}, {"num_heads": 5}):
        with pytest.raises(ValueError, match=r"embed_dim|depth"):
            PoseConfig(**change)


def test_operations_are_those_that_torch_counts():
    model = make_model(encoder=True)
    images = torch.zeros(2, 8, 12, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        model(images)
    counted, attention = counter.get_total_flops() / 2, 4 * (2 * 7 * 7 * 16 + 2 * 2 * 6 * 6 * 24)
    rotations = 2 * 24 * 4**3  # squarings of K
    rest = counted - frame_flops(CONFIG, GRID, SIZES, 1, True) / 3 + attention
    assert 0 <= rest <= rotations + 500


def test_scores_by_hand():
    T = cameras(4).numpy()
    R, t = T[:, :3, :3], T[:, :3, 3]
    assert scores_of(errors_of(R, 3 * t, R, t))["auc5"] == pytest.approx(1)
    errors = errors_of(np.where(np.arange(4)[:, None, None] == 1, np.nan, R), t * np.array([[1], [1], [0], [-1]]), R, t)
    assert errors.rotation == pytest.approx([0, 180, 0, 0], abs=1e-6)
    assert errors.direction == pytest.approx([0, 180, 180, 180], abs=1e-6)
    found = scores_of(errors)
    assert found["auc20"] == pytest.approx(0.25)
    assert found["direction_median"] == pytest.approx(180)


def test_points_of_one_view_are_on_their_lines_in_the_other():
    T, K = cameras(2).numpy(), np.array([[50.0, 0, 32], [0, 60, 24], [0, 0, 1]])
    a = np.random.default_rng(0).uniform(-1, 1, (5, 3)) + (0, 0, 4)
    b = a @ T[1, :3, :3].T + T[1, :3, 3]
    pixels = [x @ K.T / x[:, 2:] for x in (a, b)]
    lines = epipolar_lines(pixels[0][:, :2], K, K, T[1])
    distances = (lines * pixels[1]).sum(1) / np.hypot(lines[:, 0], lines[:, 1])
    assert np.abs(distances).max() < 1e-9


@pytest.mark.slow
def test_blocks_compile_once_and_give_the_same():
    model, graphs = make_model(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = run(model, tokens_of(2))
    compute = torch.compile(Block._compute, fullgraph=True, backend=backend)
    for block in model.decoder.blocks:
        block.compiled_compute = compute
    for _ in range(3):
        close(run(model, tokens_of(2)), expected, 1e-5)
    assert len(graphs) == 1
