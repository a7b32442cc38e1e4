"""Training frames with depth and cameras: plans, geometry, colours, bad files, held-out scenes, evaluation lists."""

import colorsys
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from plane_world import WALL, WIDE, shot

from fastmum.data.colour import FACTORS, IS_GREY, LUMA, NOTHING, ORDER, draw_jitter, jitter
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.evaluation import evaluation_batch, evaluation_sequences, evaluation_size
from fastmum.data.manifest import Manifests, SequenceRecord, write_manifest
from fastmum.data.scene_loader import SceneLoader
from fastmum.data.scene_plan import ScenePlanner
from fastmum.geometry.camera import rigid_inverse, transform, unproject
from fastmum.tasks.reconstruction.data import SceneDataSection, open_scenes

SEQUENCES, FRAMES = 4, 6
SETTINGS = {"frames_per_batch": 8, "views": (2, 4), "min_frames": 2, "image_size": 32, "aspects": (0.5, 0.5)}


@pytest.fixture
def walls(tmp_path):
    """Four sequences of six shots of a wall, 64 x 48 px, depth in millimetres; the last frame has none."""
    for s in range(SEQUENCES):
        for i in range(FRAMES):
            camera = shot((0.1 * i, 0.1 * s, 0.05 * i), (0.02 * s, 0.03 * i, 0.0))
            camera.save(tmp_path / f"s{s}/rgb/{i}.png", tmp_path / f"s{s}/depth/{i}.png", 1000 * camera.depth())
    return write(tmp_path)


def write(root, name="wall", masks=None, builder=None, unit=1e-3):
    shots = [[shot((0.1 * i, 0.1 * s, 0.05 * i), (0.02 * s, 0.03 * i, 0.0)) for i in range(FRAMES)] for s in range(4)]
    records = [
        SequenceRecord(
            f"s{s}", [f"s{s}/rgb/{i}.png" for i in range(FRAMES)],
            np.stack([camera.T for camera in cameras]).astype(np.float32),
            np.array([camera.K[[0, 1, 0, 1], [0, 1, 2, 2]] for camera in cameras], np.float32),
            depths=[f"s{s}/depth/{i}.png" if i < FRAMES - 1 else "" for i in range(FRAMES)],
            depth_format=DepthFormat("png16", unit), masks=masks,
        )
        for s, cameras in enumerate(shots)
    ]  # fmt: skip
    metadata = {"builder": builder} if builder else {}
    write_manifest(root / f"{name}.arrow", records, dataset=name, root=root, metadata=metadata)
    return Manifests([root / f"{name}.arrow"])


def loader_of(planner, **options):
    return SceneLoader(planner.manifests, 2, usable=planner.usable, **options)


def plain(planner, rows, lengths=None):
    """A plan of these rows without augmentation."""
    plan, n = planner.plan(0), len(rows)
    return plan._replace(
        rows=np.array(rows), lengths=np.array(lengths or [n]), scales=np.ones((n, 2)), margins=np.full(n, 4.0),
        jitter=np.tile(NOTHING, (n, 1)),
    )  # fmt: skip


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_plans_depend_on_nothing_but_seed_step_and_rank(walls):
    planner, other = (ScenePlanner(walls, seed=3, world_size=n, **SETTINGS) for n in (2, 8))
    plans = [planner.plan(step, rank) for step in range(20) for rank in range(2)]
    later = [other.plan(step, rank) for step in range(5, 20) for rank in range(2)]
    assert all(same(a, b) for a, b in zip(plans[10:], later, strict=True))
    assert not any(same(a, b) for i, a in enumerate(plans) for b in plans[:i])
    assert not same(plans[0], ScenePlanner(walls, seed=4, **SETTINGS).plan(0))
    assert {len(plan.lengths) for plan in plans} == {4, 2} == {8 // n for n in (2, 3, 4)}
    for plan, (step, rank) in zip(plans, np.ndindex(20, 2), strict=True):
        assert plan.size == (32, 16)
        assert len({*plan.lengths.tolist()}) == 1, "one length in a batch"
        assert plan.lengths.tolist() == planner.lengths(step, rank).tolist()
        of = walls.sequence_of(plan.rows).reshape(len(plan.lengths), -1)
        assert (of == of[:, :1]).all(), "frames of a sequence are together"
        assert (plan.rows % FRAMES < FRAMES - 1).all(), "without depth, never drawn"
    assert planner.step_frames(7) == sum(len(planner.plan(7, rank).rows) for rank in range(2))


def test_the_distributions_are_those_of_the_public_training(walls):
    planner = ScenePlanner(walls, frames_per_batch=48, min_frames=5)
    plans = [planner.plan(step) for step in range(400)]
    lengths = [int(plan.lengths[0]) for plan in plans]
    assert {*lengths} == set(range(2, 25))
    assert all(len(plan.lengths) == 48 // n for plan, n in zip(plans, lengths, strict=True))
    sides = {plan.size for plan in plans}
    assert {width for width, _ in sides} == {512}
    assert {height for _, height in sides} == {16 * n for n in range(10, 33)}, "floor(512 a / 16) 16, a in .33 ... 1"
    assert any(len({*plan.rows[: plan.lengths[0]].tolist()}) < plan.lengths[0] <= 5 for plan in plans), "replacement"
    scales, margins, colours = (np.concatenate([plan[i] for plan in plans]) for i in (3, 4, 5))
    assert scales.min() >= 0.8
    assert abs((scales == 1).mean() - 0.5) < 0.02, "U(.8, 1.2), at most 1"
    assert 4 <= margins.min() <= margins.max() < 4 + 0.3 * 512
    assert abs((margins - 4).mean() - 0.1 * 512) < 1, "the mean of Triangular(0, 0, .3)"
    assert abs((colours[:, FACTORS] == NOTHING[FACTORS]).all(1).mean() - 0.1) < 0.02
    assert abs(colours[:, IS_GREY].mean() - 0.05) < 0.01
    shared = [
        np.ptp(plan.jitter[:n], axis=0).max() == 0 for plan, n in zip(plans, lengths, strict=True) if n >= 8
    ]  # of longer sequences, none is shared by chance
    assert abs(np.mean(shared) - 0.7) < 0.07


def test_sequences_that_are_too_short_and_weights(walls, tmp_path):
    with pytest.raises(DataError, match=r"6 frames \(data.min_frames\) with pose"):
        ScenePlanner(walls, **SETTINGS | {"min_frames": 6})
    assert ScenePlanner(walls, ground_truth=False, **SETTINGS | {"min_frames": 6}).usable.all()
    record = SequenceRecord("photos", [f"s0/rgb/{i}.png" for i in range(FRAMES)])
    write_manifest(tmp_path / "p.arrow", [record], dataset="photos", root=tmp_path, metadata={})
    write(tmp_path, "other")
    both = Manifests([tmp_path / f"{name}.arrow" for name in ("wall", "p", "other")])
    planner = ScenePlanner(both, {"wall": 3}, **SETTINGS)
    assert "'photos' is never drawn" in planner.notes[0]
    drawn = np.concatenate([both.dataset_of[both.sequence_of(planner.plan(i).rows)] for i in range(300)])
    assert abs((drawn == 0).mean() - 0.75) < 0.05
    for weights in ({"wall": 0, "other": 0}, {"wal": 1}):
        with pytest.raises(DataError, match=r"data\.weights"):
            ScenePlanner(both, weights, **SETTINGS)


def test_neighbours_of_virtual_kitti(tmp_path):
    n, poses = 900, np.tile(np.eye(4, dtype=np.float32), (900, 1, 1))
    record = SequenceRecord("drive", [f"{i}.jpg" for i in range(n)], poses, np.ones((n, 4), np.float32),
                            depths=[f"{i}.png" for i in range(n)], depth_format=DepthFormat("png16"))  # fmt: skip
    metadata = {"builder": "vkitti2"}
    write_manifest(tmp_path / "m.arrow", [record], dataset="mine", root=tmp_path, metadata=metadata)
    planner = ScenePlanner(Manifests([tmp_path / "m.arrow"]))
    far = 0
    for plan in map(planner.plan, range(200)):
        length = plan.lengths[0]
        away = plan.rows.reshape(-1, length)
        away = away - away[:, :1]
        assert ((away >= -8 * length) & (away < 8 * length)).all()
        far = max(far, np.abs(away).max() / length)
    assert far > 7.5


def test_the_camera_of_a_crop_by_hand_and_depth_on_the_wall(walls):
    """The principal point (32, 24) of 64 x 48: 62 x 46 px around it become 36 x 26; 32 x 16 of it begin at (2, 5)."""
    planner = ScenePlanner(walls, **SETTINGS)
    batch = loader_of(planner).load(plain(planner, [7, 8, 13], [2, 1]))
    assert batch.lengths == (2, 1)
    assert batch.names == ("wall/s1", "wall/s2")
    f = 36 / 62
    K = [[60 * f, 0, 32 * f - 2], [0, 60 * f, 24 * f - 5], [0, 0, 1]]
    assert np.allclose(batch.intrinsics, np.tile(K, (3, 1, 1)), rtol=1e-6)
    assert batch.images.shape == (3, 16, 32, 3)
    assert (batch.images.dtype, batch.depth.dtype, batch.valid.dtype) == (torch.uint8, torch.float32, torch.bool)
    assert np.allclose(batch.camera_from_world[0].numpy(), shot((0.1, 0.1, 0.05), (0.02, 0.03, 0)).T, atol=1e-6)
    check_walls(batch)


def test_augmented_frames_stay_on_the_wall(walls):
    planner = ScenePlanner(walls, **SETTINGS)
    scales = set()
    for step in range(6):
        plan = planner.plan(step)
        batch = loader_of(planner).load(plan._replace(jitter=np.tile(NOTHING, (len(plan.rows), 1))))
        check_walls(batch)
        scales |= {float(K[0, 0]) for K in batch.intrinsics}
        assert not torch.equal(batch.images, loader_of(planner).load(plan).images)
    assert len(scales) > 20


def check_walls(batch):
    """Valid pixels are on the wall, in the colour of their place; the farthest 2 % are unknown."""
    assert torch.equal(batch.valid, batch.depth > 0)
    for image, depth, valid, K, T in zip(*(x.numpy() for x in batch[:5]), strict=True):
        assert valid[4:-4, 4:-4].mean() > 0.5
        points = transform(rigid_inverse(T), unproject(depth, K))[valid]
        assert np.allclose(points[:, 2], WALL, atol=0.06), "nearest pixels"
        place = (points[:, :2] / (2 * WIDE) + 0.5).clip(0, 1)
        assert np.median(np.abs(image[valid][:, :2] / 255 - place)) < 0.02


def test_depth_is_cleaned_by_the_rule_of_its_data_set(walls, tmp_path):
    depth = np.random.default_rng(0).permutation(np.linspace(1, 100, 64 * 48)).reshape(48, 64)
    mask = np.mgrid[:48, :64][1] < 32
    Image.fromarray(np.uint8(255 * mask)).save(tmp_path / "mask.png")
    Image.new("L", (64, 48)).save(tmp_path / "empty.png")
    for i in range(FRAMES):
        Image.fromarray(np.rint(500 * depth).astype(np.uint16)).save(tmp_path / f"s0/depth/{i}.png")

    def load(builder, mask):
        manifests = write(tmp_path, "again", masks=[mask] * FRAMES, builder=builder, unit=2e-3)
        planner = ScenePlanner(manifests, **SETTINGS | {"image_size": 64, "aspects": (0.75, 0.75)})
        return loader_of(planner).load(plain(planner, [0, 1]))

    assert load(None, "mask.png").depth.max() == pytest.approx(np.percentile(depth, 98), abs=0.3)
    assert load("vkitti2", "mask.png").depth.max() == pytest.approx(80, abs=0.3)
    masked = load("wildrgbd", "mask.png")
    assert not masked.valid[..., 36:].any()
    assert masked.valid[..., 4:28].float().mean() > 0.8
    for builder in ("wildrgbd", "rgbd"):
        empty = load(builder, "empty.png")
        assert not empty.valid.any()
        assert not empty.depth.any()


def test_bad_files_are_replaced_by_frames_of_the_sequence_and_counted(walls, tmp_path):
    planner = ScenePlanner(walls, **SETTINGS)
    plan = planner.plan(1)._replace(rows=np.array([6, 7, 8, 12, 13, 14]), lengths=np.array([3, 3]))
    plan = plan._replace(**{name: getattr(plan, name)[[0, 1, 2, 3, 4, 5]] for name in ("scales", "margins", "jitter")})
    expected = loader_of(planner).load(plan._replace(rows=np.array([6, 9, 8, 12, 13, 15])))
    (tmp_path / "s1/depth/1.png").write_bytes(b"no map")
    (tmp_path / "s2/depth/2.png").unlink()
    loader = loader_of(planner, bad_frames=tmp_path / "bad.log", retry_s=0.0)
    assert same(loader.load(plan), expected), "same crops and colours"
    assert loader.faults.counts == {"wall": 2}
    listed = [line.split("\t")[1] for line in (tmp_path / "bad.log").read_text().splitlines()]
    assert listed == [str(walls.file(7)), str(walls.file(14))]
    (first, again) = loader.batches([plan, plan])
    assert same(first, again)
    assert same(again, expected)
    assert loader.faults.counts == {"wall": 2}

    for file in (tmp_path / "s1/rgb").iterdir():
        file.write_bytes(b"no image")
    moved = loader.load(plan)
    assert moved.names[0] != "wall/s1"
    assert moved.names[1] == "wall/s2"
    other = int(moved.names[0][-1])
    poses = [shot((0.1 * i, 0.1 * other, 0.05 * i), (0.02 * other, 0.03 * i, 0)).T for i in range(FRAMES)]
    assert all(any(np.allclose(T, pose, atol=1e-5) for pose in poses) for T in moved.camera_from_world[:3].numpy())
    assert loader.faults.counts == {"wall": 4}
    for s in range(SEQUENCES):
        shutil.rmtree(tmp_path / f"s{s}/depth")
    with pytest.raises(DataError, match=r"^[^\n]*cannot be decoded[^\n]*$"):
        loader_of(planner).load(plan)


def test_a_depth_map_that_is_missing_for_a_moment_is_waited_for(walls, tmp_path):
    planner = ScenePlanner(walls, **SETTINGS)
    plan = plain(planner, [1, 2])
    expected, file = loader_of(planner).load(plan), tmp_path / "s0/depth/2.png"
    file.rename(tmp_path / "away.png")
    timer = threading.Timer(0.3, (tmp_path / "away.png").rename, [file])
    timer.start()
    loader = loader_of(planner, retry_s=60.0)
    assert same(loader.load(plan), expected)
    assert loader.faults.counts == {}
    timer.join()


def test_frames_without_ground_truth(walls, tmp_path):
    record = SequenceRecord("s0", [f"s0/rgb/{i}.png" for i in range(FRAMES)])
    write_manifest(tmp_path / "p.arrow", [record], dataset="photos", root=tmp_path, metadata={})
    planner = ScenePlanner(Manifests([tmp_path / "p.arrow"]), ground_truth=False, **SETTINGS)
    batch = loader_of(planner, ground_truth=False).load(plain(planner, [1, 2]))
    with_cameras = ScenePlanner(walls, **SETTINGS)
    assert torch.equal(batch.images, loader_of(with_cameras).load(plain(with_cameras, [1, 2])).images)
    assert not batch.valid.any()
    assert batch.intrinsics[:, 0, 0].isnan().all()
    assert batch.camera_from_world.isnan().all()
    one = loader_of(with_cameras).load(plain(with_cameras, [3]))
    assert one.images.shape == (1, 16, 32, 3)
    assert one.valid.any()


def test_jitter_by_hand():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(jitter(image, np.array(NOTHING)), image)

    def changed(which, factor, **columns):
        parameters = np.array(NOTHING)
        parameters[FACTORS.start + which] = factor
        return jitter(image, parameters) / 255

    x = image / 255
    grey = x @ LUMA
    assert np.allclose(changed(0, 1.5), np.minimum(1.5 * x, 1), atol=0.003)
    assert np.allclose(changed(1, 0.5), 0.5 * x + 0.5 * grey.mean(), atol=0.003)
    assert np.allclose(changed(2, 1.4), np.clip(1.4 * x - 0.4 * grey[..., None], 0, 1), atol=0.003)
    for turns in (0.1, -0.07):
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)]
        rgb = [colorsys.hsv_to_rgb((h + turns) % 1, s, v) for h, s, v in hsv]
        assert np.allclose(changed(3, turns).reshape(-1, 3), rgb, atol=0.003)
    grey_parameters = np.array(NOTHING)
    grey_parameters[IS_GREY] = 1
    assert np.allclose(jitter(image, grey_parameters) / 255, grey[..., None].repeat(3, -1), atol=0.003)
    # The order counts: darker, then grey about the darker mean, or the other way round.
    parameters = np.array(NOTHING)
    parameters[FACTORS] = 0.6, 0.5, 1, 0
    parameters[ORDER] = 0.1, 0.2, 0.3, 0.4
    darker = 0.6 * x
    assert np.allclose(jitter(image, parameters) / 255, 0.5 * darker + 0.5 * (darker @ LUMA).mean(), atol=0.003)
    parameters[FACTORS][0] = 1.5
    parameters[ORDER] = 0.2, 0.1, 0.3, 0.4
    brighter = np.minimum(1.5 * (0.5 * x + 0.5 * grey.mean()), 1)
    assert np.allclose(jitter(image, parameters) / 255, brighter, atol=0.003)
    drawn = draw_jitter(rng, 4000)[:, FACTORS]
    assert np.allclose(drawn.min(0), [0.5, 0.5, 0.5, -0.1], atol=0.01)
    assert np.allclose(drawn.max(0), [1.5, 1.5, 1.5, 0.1], atol=0.01)


def test_held_out_scenes_of_a_folder_are_never_trained_on(walls, tmp_path, monkeypatch):
    for s in range(SEQUENCES):
        poses = [np.linalg.inv(shot((0.1 * i, 0.1 * s, 0.05 * i), (0.02 * s, 0.03 * i, 0)).T) for i in range(FRAMES)]
        np.savetxt(tmp_path / f"s{s}/poses.txt", np.stack(poses).reshape(FRAMES, 16))
        (tmp_path / f"s{s}/intrinsics.txt").write_text("60 60 32 24\n")
    data = SceneDataSection(root=str(tmp_path), min_frames=5, held_out=0.4, image_size=32, views=[2, 4])
    data.check(16)
    splits, again = (open_scenes(data, tmp_path / "run", seed, resumed=seed > 0) for seed in (0, 1))
    assert splits.manifests.datasets == ("rgbd",)
    held = {*np.flatnonzero(splits.is_held_out).tolist()}
    assert len(held) == 2
    for planner, expected in ((splits.training, {*range(4)} - held), (splits.held_out, held)):
        rows = np.concatenate([planner.plan(step).rows for step in range(60)])
        assert {*splits.manifests.sequence_of(rows).tolist()} == expected
    assert same(splits.held_out.plan(5), again.held_out.plan(5)), "whatever the seed"
    assert not same(splits.training.plan(5), again.training.plan(5))
    plan = splits.held_out.plan(0)
    assert (plan.scales == 1).all()
    assert (plan.jitter == NOTHING).all()
    (batch,) = splits.loader(data).batches([plan])
    assert batch.images.shape[2] == 32
    check_walls(batch)
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    monkeypatch.setattr(Manifests, "depth_readers", {"exr"})
    with pytest.raises(DataError, match=r"OpenEXR: pip install 'fastmum\[exr\]'"):
        splits.loader(data)


def test_evaluation_lists_repeat_the_public_generator(walls):
    np.random.seed(0)
    expected = [np.random.choice(5, 3, replace=False) + FRAMES * s for s in range(SEQUENCES)]
    found = evaluation_sequences(walls, 3, columns=("pose", "depth"))
    assert [each.rows.tolist() for each in found] == [rows.tolist() for rows in expected]
    assert [each.name for each in found] == [each.group for each in found] == [f"s{s}" for s in range(4)]
    assert evaluation_sequences(walls) == []
    assert [each.name for each in evaluation_sequences(walls, 6, only=[3, 1])] == ["s1", "s3"]


def test_sizes_of_evaluation(walls, tmp_path):
    for size, kept in (((640, 480), (512, 384)), ((480, 640), (384, 512)), ((1600, 1063), (512, 336)),
                       ((100, 100), (512, 512)), ((4000, 30), (512, 16))):  # fmt: skip
        assert evaluation_size(size) == kept
        assert evaluation_size(size, keep_aspect=False) == (512, 512)
    wide = evaluation_batch(walls, [0, 1], 64)
    assert wide.images.shape == (2, 48, 64, 3)
    assert np.allclose(wide.intrinsics[0], [[60, 0, 32], [0, 60, 24], [0, 0, 1]])
    square = evaluation_batch(walls, [0, 1], 96, keep_aspect=False)
    assert np.allclose(square.intrinsics[0], [[90, 0, 48], [0, 120, 48], [0, 0, 1]])
    # A portrait in the same sequence: both are padded with white to 64 x 64.
    camera = shot((0.1, 0, 0.05), (0, 0.03, 0), size=(48, 64))
    camera.save(tmp_path / "s0/rgb/1.png", tmp_path / "s0/depth/1.png", 1000 * camera.depth())
    mixed = evaluation_batch(walls, [0, 1], 64)
    assert mixed.images.shape == (2, 64, 64, 3)
    assert (mixed.images[0, :8] == 255).all()
    assert torch.equal(mixed.images[0, 8:-8], wide.images[0])
    assert np.allclose(mixed.intrinsics[0], [[60, 0, 32], [0, 60, 32], [0, 0, 1]])
    assert not mixed.valid[0, :8].any()
