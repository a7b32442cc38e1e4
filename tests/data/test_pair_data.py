"""Pairs of frames: overlap, plans, sampling by distance, geometry, bad files, held-out scenes."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from plane_world import shot

from fastmum.data import overlap, staging, store
from fastmum.data.colour import FACTORS, IS_GREY, NOTHING
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError
from fastmum.data.manifest import Manifests, SequenceRecord, write_manifest
from fastmum.data.pair_loader import PairLoader, square_view
from fastmum.data.pair_plan import DistantPairs, PairPlanner
from fastmum.geometry import View
from fastmum.tasks.pairs import PairDataSection, open_pairs

FRAMES = 6
STEP = 0.5  # metres to the right from frame to frame: an eighth of a view of 64 px at f 64, 4 m from the wall


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/overlap"


@pytest.fixture
def walls(tmp_path):
    """Three sequences of six shots of a wall from cameras on a line; the last frame has no depth."""
    return write(tmp_path / "walls")


def write(root, name="wall", builder=None):
    records = []
    for s in range(3):
        shots = [shot((STEP * i, 0.1 * s, 0), (0, 0, 0), focal=64.0, size=(64, 64)) for i in range(FRAMES)]
        for i, camera in enumerate(shots):
            camera.save(root / f"s{s}/rgb/{i}.png", root / f"s{s}/depth/{i}.png", 1000 * camera.depth())
        records.append(SequenceRecord(
            f"s{s}", [f"s{s}/rgb/{i}.png" for i in range(FRAMES)],
            np.stack([camera.T for camera in shots]).astype(np.float32),
            np.array([camera.K[[0, 1, 0, 1], [0, 1, 2, 2]] for camera in shots], np.float32),
            depths=[f"s{s}/depth/{i}.png" if i < FRAMES - 1 else "" for i in range(FRAMES)],
            depth_format=DepthFormat("png16", 1e-3),
        ))  # fmt: skip
    metadata = {"builder": builder} if builder else {}
    write_manifest(root / f"{name}.arrow", records, dataset=name, root=root, metadata=metadata)
    return Manifests([root / f"{name}.arrow"])


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def distances(planner, steps=100):
    """Distances in the sequence of the pairs of some plans, and whether all are within a sequence."""
    rows = np.concatenate([planner.plan(step).rows for step in range(steps)]).reshape(-1, 2)
    sequences = planner.manifests.sequence_of(rows)
    assert (sequences[:, 0] == sequences[:, 1]).all()
    return rows[:, 1] - rows[:, 0]


def test_overlap_of_a_wall_by_hand_and_its_cache(walls, cache, monkeypatch, caplog):
    table = overlap.pair_table(walls)
    assert len(table.rows) == 3 * 10, "five frames of each sequence have depth"
    assert np.array_equal(walls.sequence_of(table.rows[:, 0]), walls.sequence_of(table.rows[:, 1]))
    apart = table.rows[:, 1] - table.rows[:, 0]
    assert np.allclose(table.overlap, 1 - apart * STEP / 4, atol=0.03), "a view is 4 m wide"
    monkeypatch.setattr(overlap, "_compute", None)
    assert same(overlap.pair_table(walls), table)
    monkeypatch.undo()
    file, *_ = sorted(cache.glob("*/*"))
    file.write_bytes(file.read_bytes()[:100])
    monkeypatch.setenv("FASTMUM_CACHE", str(cache.parent))
    assert same(overlap.pair_table(walls), table)
    assert "computed again" in caplog.text


def test_an_interrupted_computation_goes_on(walls, tmp_path, monkeypatch):
    computed, whole = [], overlap.pair_table(walls)
    compute = overlap._overlap

    def counted(a, b):
        computed.append(len(a))
        return 1 / 0 if len(computed) == 2 else compute(a, b)

    monkeypatch.setenv("FASTMUM_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(overlap, "_overlap", counted)
    with pytest.raises(ZeroDivisionError):
        overlap.pair_table(walls, workers=1)
    del computed[:]
    monkeypatch.setattr(overlap, "_overlap", lambda a, b: (computed.append(len(a)), compute(a, b))[1])
    assert same(overlap.pair_table(walls), whole)
    assert computed == [10, 10], "the first sequence was kept"


def test_the_smaller_share_counts_and_bad_maps_are_left_out(walls, tmp_path, caplog, monkeypatch):
    # From half the distance a camera sees a quarter of the other's view, all of which is also in that view.
    far, near = (shot((0, 0, z), (0, 0, 0), focal=64.0, size=(64, 64)) for z in (0, 2))
    frames = [far.frame(), near.frame()]
    assert overlap.frame_overlap(frames, frames[::-1]) == pytest.approx([0.25, 0.25], abs=0.03)
    (tmp_path / "walls/s1/depth/0.png").write_bytes(b"no map")
    assert len(overlap.pair_table(walls).rows) == 30 - 4
    assert caplog.text.count("s1/depth/0.png") == 1
    monkeypatch.setattr(overlap, "SCENE_PAIRS", 6)
    monkeypatch.setattr(overlap, "LEAST_PAIRS", 1)
    shutil.rmtree(tmp_path / "cache")
    some = overlap.pair_table(walls).rows
    assert len(np.unique(some, axis=0)) == len(some) <= 18


def test_plans_by_overlap_are_pure_and_in_the_range(walls):
    settings = {"pairs_per_batch": 4, "size": (32, 32), "overlap": (0.55, 0.8)}
    planner, other = (PairPlanner(walls, seed=3, world_size=n, **settings) for n in (2, 8))
    plans = [planner.plan(step, rank) for step in range(10) for rank in range(2)]
    later = [other.plan(step, rank) for step in range(5, 10) for rank in range(2)]
    assert all(same(a, b) for a, b in zip(plans[10:], later, strict=True))
    assert not any(same(a, b) for i, a in enumerate(plans) for b in plans[:i])
    assert not same(plans[0], PairPlanner(walls, seed=4, **settings).plan(0))
    assert {*distances(planner).tolist()} == {-3, -2, 2, 3}
    plan = plans[0]
    assert (plan.rows.shape, plan.lengths.tolist(), plan.size) == ((8,), [2, 2, 2, 2], (32, 32))
    assert not plan.jitter[:, IS_GREY].any()
    assert not (plan.jitter[:, FACTORS] == NOTHING[FACTORS]).all(1).any(), "every frame, each its own"
    assert len(np.unique(plan.jitter[:, FACTORS], axis=0)) == 8
    with pytest.raises(ValueError, match="rank 2"):
        planner.plan(0, 2)


def test_pairs_by_distance_and_mixtures(walls, tmp_path):
    planner = PairPlanner(walls, sampling="distance", gaps={"wall": (2, 3)})
    found = distances(planner)
    assert {*found.tolist()} == {-3, -2, 2, 3}
    assert abs((found > 0).mean() - 0.5) < 0.05
    assert FRAMES - 1 in planner.plan(0).rows % FRAMES, "depth is not needed"
    n, poses = 900, np.tile(np.eye(4, dtype=np.float32), (900, 1, 1))
    record = SequenceRecord("a", [f"{i}.jpg" for i in range(n)], poses, np.ones((n, 4), np.float32))
    for builder, (least, most) in {"scannet": (10, 500), "vkitti2": (1, 100), "wildrgbd": (1, 899)}.items():
        write_manifest(tmp_path / "m.arrow", [record], dataset="mine", root=tmp_path, metadata={"builder": builder})
        apart = np.abs(distances(PairPlanner(Manifests([tmp_path / "m.arrow"]))))
        assert least <= apart.min() <= least + 5, builder
        assert 0.9 * most <= apart.max() <= most, builder
    part = SequenceRecord("a", record.frames[:24], poses[:24], np.ones((24, 4), np.float32))
    write_manifest(tmp_path / "m.arrow", [part], dataset="mine", root=tmp_path, metadata={"builder": "scannet"})
    assert "--chunk 0" in PairPlanner(Manifests([tmp_path / "m.arrow"])).notes[0]
    write_manifest(tmp_path / "m.arrow", [record], dataset="mine", root=tmp_path, metadata={"builder": builder})
    lost = DistantPairs(np.array([0, 1, 2, 900, 901, 950]), np.array([0] * 5 + [1]), (1, 3))
    rng = np.random.default_rng(0)
    drawn = {tuple(sorted(lost.draw(rng).tolist())) for _ in range(100)}
    assert drawn == {(0, 1), (0, 2), (1, 2), (900, 901)}, "frames that cannot be drawn count"
    both = Manifests([walls.parts[0].path, tmp_path / "m.arrow"])
    planner = PairPlanner(both, {"wall": 3}, overlap=(0.55, 0.8))
    drawn = np.concatenate([both.dataset_of[both.sequence_of(planner.plan(i).rows)] for i in range(50)])
    assert abs((drawn == 0).mean() - 0.75) < 0.05
    for options in ({"weights": {"wall": 0, "mine": 0}}, {"weights": {"wal": 1}}, {"gaps": {"wal": (1, 2)}},
                    {"overlap": (0.99, 1.0), "weights": {"mine": 0}}, {"sampling": "none"}):  # fmt: skip
        with pytest.raises(DataError, match=r"^[^\n]+$"):
            PairPlanner(both, **options)


def test_overlap_is_computed_only_where_it_is_needed_and_lists_are_of_usable_frames(walls, tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "_compute", None)
    for options in ({"gaps": {"wall": (2, 3)}}, {"sampling": "distance"}):
        assert len(PairPlanner(walls, **options).pairs[0])
    listed = np.array([(0, 1), (1, FRAMES - 1), (2, 3)])
    monkeypatch.setitem(overlap.LISTS, "listed", lambda part: (listed, np.full(3, 0.5, np.float32)))
    both = Manifests([walls.parts[0].path, write(tmp_path / "other", "other", "listed").parts[0].path])
    planner = PairPlanner(both, {"wall": 0}, sampling="overlap", depth=True)
    assert (planner.pairs[1].rows % (3 * FRAMES)).tolist() == [[0, 1], [2, 3]], "the last frame has no depth"
    assert [note for note in planner.notes if "has no pair" in note] == []


def test_batches_have_the_pose_and_the_depth_of_their_frames(walls):
    planner = PairPlanner(walls, pairs_per_batch=3, size=(32, 32), augment=False, depth=True)
    plan = planner.plan(0)
    batch = PairLoader((planner, None), 2, square_view).load(plan)
    assert (batch.images.shape, batch.images.dtype, batch.lengths) == ((6, 32, 32, 3), torch.uint8, (2, 2, 2))
    assert torch.allclose(batch.depth, torch.tensor(4.0), atol=1e-3)
    assert batch.valid.all()
    assert torch.allclose(batch.intrinsics[0], torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]))
    assert np.allclose(batch.camera_from_world[:, 0, 3], -STEP * (plan.rows % FRAMES), atol=1e-6)
    plain = PairPlanner(walls, pairs_per_batch=3, size=(32, 32), augment=False)
    cropped = PairLoader((plain, None), 2).load(plan)
    assert not cropped.valid.any()
    # The crop is symmetric about the principal point, here the centre.
    assert torch.allclose(cropped.intrinsics[0, :2, 2], torch.tensor([16.0, 16.0]), atol=0.6)
    jittered = PairLoader((plain, None), 2).load(PairPlanner(walls, pairs_per_batch=3, size=(32, 32)).plan(0))
    assert not torch.equal(jittered.images, cropped.images)
    # Half of the pairs are mirrored, with their cameras: x of the other camera changes its sign.
    flipping = PairPlanner(walls, pairs_per_batch=3, size=(32, 32), jitter=False, flip=True)
    flips = np.concatenate([flipping.plan(i).flip for i in range(20)])
    assert 0.3 < flips.mean() < 0.7
    mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
    turned = PairLoader((flipping, None), 2).load(plan._replace(flip=np.array([True, False, True])))
    assert torch.equal(turned.images[[0, 1, 4, 5]], cropped.images[[0, 1, 4, 5]].flip(2))
    assert torch.equal(turned.images[2:4], cropped.images[2:4])
    assert torch.allclose(turned.camera_from_world[:2], mirror @ cropped.camera_from_world[:2] @ mirror)
    assert torch.allclose(turned.intrinsics[:, :2, :2], cropped.intrinsics[:, :2, :2])
    assert torch.allclose(turned.intrinsics[0, 0, 2], 32 - cropped.intrinsics[0, 0, 2])


def test_a_squeezed_image_keeps_neither_aspect_nor_unknown_depth():
    depth = np.ones((4, 8), np.float32)
    view = square_view(View(np.zeros((4, 8, 3), np.uint8), depth=depth), (4, 4))
    assert view.size == (4, 4)
    assert (view.depth == 1).all()


def test_bad_files_move_their_pair_and_are_counted(walls, tmp_path):
    planner = PairPlanner(walls, pairs_per_batch=2, size=(32, 32), overlap=(0.55, 0.8))
    plan = planner.plan(0)
    bad = walls.file(int(plan.rows[1]))
    clean = PairLoader((planner, None), 2).load(plan)
    bad.write_bytes(b"no image")
    loader = PairLoader((planner, None), 2, bad_frames=tmp_path / "bad.log")
    batch, again = loader.batches([plan, plan])
    assert same(batch[:5], again[:5])
    assert torch.equal(batch.images[2:], clean.images[2:]) or bad == walls.file(int(plan.rows[2]))
    apart = (batch.camera_from_world[0] - batch.camera_from_world[1])[0, 3].abs().item() / STEP
    assert round(apart) in (2, 3), "in the range of overlap, too"
    assert loader.faults.counts == {"wall": 1}
    for file in (tmp_path / "walls").glob("*/rgb/*"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^[^\n]*restore them[^\n]*$"):
        PairLoader((planner, None), 2).load(plan)


def test_held_out_scenes_are_never_trained_on(walls, tmp_path, monkeypatch):
    data = PairDataSection(manifests=[str(walls.parts[0].path)], held_out=0.4, image_size=32, pairs_per_batch=4)
    data.check(16)
    splits, again = (open_pairs(data, tmp_path / "run", seed) for seed in (0, 1))
    held = {*np.flatnonzero(splits.is_held_out).tolist()}
    assert len(held) == 1
    for planner, expected in ((splits.training, {*range(3)} - held), (splits.held_out, held)):
        rows = np.concatenate([planner.plan(step).rows for step in range(30)])
        assert {*walls.sequence_of(rows).tolist()} == expected
        assert {*walls.sequence_of(planner.another(int(rows[0]), np.random.default_rng(0))).tolist()} <= expected
    assert same(splits.held_out.plan(5), again.held_out.plan(5)), "whatever the seed"
    assert not same(splits.training.plan(5), again.training.plan(5))
    file = walls.file(int(splits.held_out.plan(0).rows[0]))
    Image.new("L", (1, 1)).save(file)  # a wrong size: the principal point is outside
    (batch,) = splits.loader(data).batches([splits.held_out.plan(0)])
    assert batch.names == (f"wall/s{next(iter(held))}",) * 4
    first = FRAMES * min({*range(3)} - held)
    table = overlap.PairTable(np.array([[first, first + 1]]), np.full(1, 0.5, np.float32))
    monkeypatch.setattr("fastmum.data.pair_plan.pair_table", lambda *_: table)
    with pytest.raises(DataError, match="held-out"):
        open_pairs(data, tmp_path / "run")


def test_a_data_set_that_was_moved_and_a_stage(walls, tmp_path, monkeypatch):
    moved = (tmp_path / "walls").rename(tmp_path / "moved")
    data = PairDataSection(
        manifests=[str(moved / "wall.arrow")], roots={"wall": str(moved)}, stage=str(tmp_path / "scratch"),
        held_out=0.4, image_size=32, pairs_per_batch=4,
    )  # fmt: skip
    monkeypatch.setattr(store, "stage", None)  # restored afterwards
    monkeypatch.setattr(staging, "_stage", None)
    splits = open_pairs(data, tmp_path / "run")
    assert store.stage is not None
    loader = splits.loader(data)
    list(loader.batches([splits.training.plan(0)]))
    assert not any(loader.faults.counts.values())
