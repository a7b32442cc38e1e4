"""Distillation: losses by hand, teachers from runs and from VGGT's layout, the cache of their outputs."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fastmum.config import ConfigError
from fastmum.config.load import load_config
from fastmum.engine.checkpoint import read_weights
from fastmum.engine.rundir import read_metrics
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.tasks import find_task
from fastmum.tasks.reconstruction.aggregator import Sequences
from fastmum.tasks.reconstruction.convert import LayoutError, to_public
from fastmum.tasks.reconstruction.distill import DistillConfig, Teacher, distill_losses
from fastmum.tasks.reconstruction.load import load_reconstruction
from fastmum.tasks.reconstruction.losses import Prediction
from fastmum.tasks.reconstruction.model import Reconstruction, ReconstructionConfig
from fastmum.tasks.reconstruction.targets import TargetCache, Targets
from fastmum.train import train

WIDTH, SIDE, PATCH, REGISTERS = 64, 3, 14, 4
SIZES = ReconstructionConfig(
    encoder_dim=WIDTH, embed_dim=32, pairs=4, num_heads=2, registers=2, patch_size=PATCH, taps=(0, 1, 2, 3),
    dpt_features=16, dpt_levels=(8, 8, 8, 8), camera_heads=16, camera_blocks=1, camera_iterations=4,
)  # fmt: skip


def filled(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else 0.7 * math.prod(shape[1:]) ** -0.5)


def dinov2(generator: torch.Generator) -> dict[str, Tensor]:
    """A random DINOv2 of one head and two blocks under its names."""
    shapes = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + SIDE * SIDE, WIDTH), "mask_token": (1, WIDTH),
        "register_tokens": (1, REGISTERS, WIDTH), "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
    }  # fmt: skip
    for i in range(2):
        for name, out, inner in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes |= {
                f"blocks.{i}.{name}.weight": (out * WIDTH, inner * WIDTH),
                f"blocks.{i}.{name}.bias": (out * WIDTH,),
            }
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (WIDTH,)
    return {name: filled(shape, generator) for name, shape in shapes.items()}


def dinov2_tokens(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Its normed patch tokens for normalised images (F, 3, H, W), as in facebookresearch/dinov2."""
    patches = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    table = state["pos_embed"][:, 1:].mT.unflatten(2, (SIDE, SIDE))
    table = F.interpolate(table, patches.shape[2:], mode="bicubic", align_corners=False, antialias=True)
    x, frames = (patches + table).flatten(2).mT, len(pixels)
    first = (state["cls_token"] + state["pos_embed"][:, :1]).expand(frames, -1, -1)
    x = torch.cat([first, state["register_tokens"].expand(frames, -1, -1), x], 1)
    for i in range(2):
        w = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items()}
        normed = F.layer_norm(x, (WIDTH,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        q, k, v = F.linear(normed, w["attn.qkv.weight"], w["attn.qkv.bias"]).chunk(3, -1)
        attended = (q @ k.mT / WIDTH**0.5).softmax(-1) @ v
        x = x + w["ls1.gamma"] * F.linear(attended, w["attn.proj.weight"], w["attn.proj.bias"])
        normed = F.layer_norm(x, (WIDTH,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        hidden = F.gelu(F.linear(normed, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        x = x + w["ls2.gamma"] * F.linear(hidden, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    return F.layer_norm(x, (WIDTH,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 1 + REGISTERS :]


def test_a_teacher_in_the_layout_of_the_public_checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    plain = Reconstruction(SIZES)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(filled(parameter.shape, generator))
    encoder = dinov2(generator)
    public = to_public(plain.state_dict()) | {f"aggregator.patch_embed.{name}": x for name, x in encoder.items()}
    torch.save(public | {"track_head.x": torch.zeros(1)}, tmp_path / "vggt.pt")
    model = load_reconstruction(tmp_path / "vggt.pt")
    save_file({name: x.contiguous() for name, x in public.items()}, tmp_path / "model.safetensors")
    from_folder = load_reconstruction(tmp_path).state_dict()
    assert all(torch.equal(x, from_folder[name]) for name, x in model.state_dict().items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    images = torch.randint(0, 256, (3, 2 * PATCH, 4 * PATCH, 3), dtype=torch.uint8, generator=generator)
    pixels = (images / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    tokens = dinov2_tokens(encoder, pixels.permute(0, 3, 1, 2))
    with torch.no_grad():
        expected = plain.predict(tokens, (2, 4), Sequences.of([2, 1]))
    found = Teacher(model)(images, [2, 1])
    for a, b in zip(found, (expected.cameras[-1], expected.depth, expected.points), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
    # Frames of other sizes are resized to multiples of its patch, and its maps back.
    assert Teacher(model).size(32, 64) == (28, 70)
    assert Teacher(model, 28).size(32, 64) == (14, 28)
    smaller = Teacher(model, 28)(images, [2, 1])
    assert smaller.depth.shape == (3, 28, 56)
    assert not torch.allclose(smaller.depth, found.depth)
    with pytest.raises(ConfigError, match="image_size"):
        Teacher(model, 30)
    del public["aggregator.patch_embed.norm.weight"]
    torch.save(public, tmp_path / "vggt.pt")
    with pytest.raises(LayoutError, match="DINOv2"):
        load_reconstruction(tmp_path / "vggt.pt")


def test_losses_are_l2_errors_without_confidences():
    cameras = [torch.zeros(2, 9, requires_grad=True) for _ in range(3)]
    depth, points = torch.ones(2, 4, 5, requires_grad=True), torch.zeros(2, 4, 5, 3, requires_grad=True)
    targets = Targets(torch.full((2, 9), 2.0), torch.full((2, 4, 5), 3.0), torch.tensor([0.0, 3, 4]).expand(2, 4, 5, 3))
    losses = distill_losses(Prediction(cameras, depth, 7 * depth, points, 7 * depth), targets)
    assert losses["camera"].item() == pytest.approx(6 * (1 + 0.6 + 0.36) / 3)
    assert losses["depth"].item() == pytest.approx(2)
    assert losses["points"].item() == pytest.approx(5)
    losses["objective"].backward()
    assert cameras[0].grad[0, 0].item() == pytest.approx(-0.36 / 3 / 2 * (2 / 6))
    assert depth.grad[0, 0, 0].item() == pytest.approx(-1 / 40)
    assert points.grad[1, 2, 3].tolist() == pytest.approx([0, -0.6 / 40, -0.8 / 40])
    last = distill_losses(Prediction(cameras, depth, depth, None, None), targets, last_iteration=True)
    assert last["camera"].item() == pytest.approx(6)
    assert "points" not in last
    exact = distill_losses(Prediction([targets.cameras.clone().requires_grad_()], depth, depth, None, None), targets)
    exact["objective"].backward()
    assert depth.grad.isfinite().all()


def test_cached_outputs_are_those_that_were_computed(tmp_path):
    images = torch.randint(0, 256, (5, 4, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = Targets(torch.randn(5, 9), torch.rand(5, 4, 6), torch.randn(5, 4, 6, 3))
    first = TargetCache(tmp_path, {"teacher": "a"}).targets(images, [2, 3], lambda: made)
    cache = TargetCache(tmp_path, {"teacher": "a"})

    def refuse():
        raise AssertionError("computed twice")

    again = cache.targets(images.flip(0), [3, 2], lambda: made)  # other sequences
    assert torch.equal(again.cameras, made.cameras)
    read = cache.targets(images, [2, 3], refuse)
    swapped = cache.targets(torch.cat([images[2:], images[:2]]), [3, 2], refuse)
    for a, b, c, x in zip(first, read, swapped, made, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(torch.cat([c[3:], c[:3]]), b)
        assert (a - x).abs().max() <= 1e-3 * x.abs().max()
    assert 5 * 4 * 6 * 8 < cache.bytes / 3 < 5 * 4 * 6 * 8 + 2000
    with pytest.raises(AssertionError):
        TargetCache(tmp_path, {"teacher": "b"}).targets(images, [2, 3], refuse)
    damaged = next(cache.folder.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    repaired = cache.targets(images, [2, 3], lambda: made)
    assert torch.equal(repaired.depth, first.depth)


ARGS = [
    "model.embed_dim=32", "model.pairs=2", "model.num_heads=2", "model.taps=[0,0,1,1]", "model.dpt_features=16",
    "model.dpt_levels=[16,16,16,16]", "model.camera_heads=4", "model.camera_blocks=1", "data.image_size=32",
    "data.aspects=[1,1]", "data.views=[2,3]", "data.min_frames=4", "data.frames_per_batch=6", "data.workers=1",
    "optim.warmup_steps=1", "train.log_every=1", "train.eval_every=2", "train.eval_batches=1", "train.threads=1",
    "train.precision=fp32", "train.checkpoint_every=2",
]  # fmt: skip


def run(folder, *args):
    task = next(arg.removeprefix("run.task=") for arg in args if arg.startswith("run.task="))
    config = load_config(None, [*ARGS, f"run.dir={folder}", *args], find_task(task).Config)
    assert train(config) == 0
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.slow
def test_a_student_learns_from_a_run_on_images_without_ground_truth(tmp_path, image_folder):
    teacher = tmp_path / "teacher"
    scenes = "data.scenes.count=3", "data.scenes.views=6", "data.scenes.size=64"
    run(teacher, "run.task=reconstruction", "model.encoder=random:mum_tiny", "train.steps=2", *scenes)
    common = (
        "run.task=distillation", "model.encoder=random:mum_tiny", f"distill.teacher={teacher}", "train.steps=4",
        f"data.root={image_folder}", "optim.base_lr=3e-3", "distill.repeat_after=2",
    )  # fmt: skip
    plain = run(tmp_path / "plain", *common)
    assert plain[-1]["camera"] < plain[0]["camera"]
    assert plain[-1].keys() >= {"held_out_loss", "depth", "points", "grad_norm/aggregator"}
    assert (tmp_path / "plain/reconstruction.png").stat().st_size > 10_000
    learnt = read_weights(tmp_path / "plain").tensors
    start = load_reconstruction(teacher).encoder.state_dict()
    changed = [name for name, x in start.items() if (y := learnt.get(f"encoder.{name}")) is not None and not x.equal(y)]
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.bias"} <= set(changed)
    cached = f"distill.cache={tmp_path / 'cache'}"
    first = run(tmp_path / "first", *common, cached)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    second = run(tmp_path / "second", *common, cached)
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert times
    for a, b, c in zip(plain, first, second, strict=True):
        assert b["loss"] == c["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert (
            b["held_out_loss" if "held_out_loss" in b else "loss"]
            == c["held_out_loss" if "held_out_loss" in c else "loss"]
        )
    # The student is a teacher itself; without the encoder's file it cannot be built.
    assert load_reconstruction(tmp_path / "plain").encoder is not None
    shutil.rmtree(teacher / "checkpoints")
    with pytest.raises(Exception, match="teacher"):
        run(tmp_path / "gone", *common)


def test_keys_that_belong_together():
    for args, name in ((["distill.cache=x", "distill.teacher=y"], "repeat_after"), ([], "distill.teacher")):
        with pytest.raises(ConfigError, match=name):
            load_config(None, args, DistillConfig)
