"""NYU, KITTI and SUN RGB-D in miniature: lists, units, crops, masks; augmentation moves image and depth together."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fastmum.data.errors import DataError
from fastmum.evaluate import depth_sets
from fastmum.evaluate.depth_sets import KITTI, NYU, SUNRGBD, open_depth, read_view, rotate, scored_view, train_view
from fastmum.geometry import View
from fastmum.geometry.metrics import depth_metrics


def ramp(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red grows to the right and green downwards, and depth in 2 to 7 metres that follows from them."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / width, 255 * y / height
    image = np.stack([red, green, np.full_like(red, 128)], -1).round().astype(np.uint8)
    return image, (2 + 3 * red / 255 + 2 * green / 255).astype(np.float32)


def save(root, image_file, depth_file, stored, image):
    for file in (root / image_file, root / depth_file):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / image_file)
    Image.fromarray(stored.astype(np.uint16)).save(root / depth_file)


def agree(view: View) -> float:
    """The largest error of depth against the colours, where it is known."""
    red, green, _ = np.moveaxis(view.image / 255, -1, 0)
    expected = 2 + 3 * red + 2 * green
    return np.abs(view.depth - expected)[view.depth > 0].max()


def test_nyu(tmp_path):
    image, depth = ramp(640, 480)
    for part, scene in (("train", "kitchen_0028b"), ("test", "bathroom")):
        lines = []
        for i in (10, 2):
            save(tmp_path, f"{scene}/rgb_{i}.png", f"{scene}/sync_depth_{i}.png", 1000 * depth, image)
            lines.append(f"/{scene}/rgb_{i}.png /{scene}/sync_depth_{i}.png 518.8579")
        lines.append(f"/{scene}/rgb_3.png None 518.8579")
        (tmp_path / f"nyu_{part}.txt").write_text("\n".join(lines) + "\n")
    train, test = (open_depth(f"nyu:{tmp_path}", part) for part in ("train", "test"))
    assert [frame.key for frame in train.frames] == ["kitchen_0028b/rgb_10.png", "kitchen_0028b/rgb_2.png"]
    assert list(test.skipped) == ["bathroom/rgb_3.png"]
    view = read_view(test.frames[0])
    np.testing.assert_allclose(view.depth, depth, atol=1e-3)
    shown, true = scored_view(view, NYU)
    assert shown.shape == (480, 640, 3)
    assert true.shape == (480, 640)
    # Eigen's crop: what is wrong outside of rows 45 to 470 and columns 41 to 600 does not count.
    found = true.copy()
    found[:45] = found[471:] = 9
    found[:, :41] = found[:, 601:] = 9
    assert depth_metrics(found, true, 10.0, crop=NYU.crop)["rmse"] == 0
    Image.fromarray(np.full((480, 640), 200, np.uint8)).save(test.frames[0].depth)
    with pytest.raises(DataError, match="8 bits"):
        read_view(test.frames[0])
    found[45, 41] = 9
    assert depth_metrics(found, true, 10.0, crop=NYU.crop)["rmse"] > 0
    for seed in range(4):
        cut = train_view(view, NYU, np.random.default_rng(seed))
        assert cut.image.shape == (416, 544, 3)
        assert cut.depth.shape == (416, 544)


def test_kitti(tmp_path):
    image, depth = ramp(1242, 375)
    depth[:200] = 0  # above the laser's field of view
    drive = "2011_09_26_drive_0002_sync"
    for part in ("train", "test"):
        color = f"2011_09_26/{drive}/image_02/data/{part}.png"
        truth = f"{drive}/proj_depth/groundtruth/image_02/{part}.png"
        save(tmp_path, f"input/{color}", f"gt_depth/{truth}", 256 * depth, image)
        (tmp_path / f"kitti_eigen_{part}.txt").write_text(f"{color} {truth} 721.5377\n{color}x None 721.5377\n")
    test = open_depth(f"kitti:{tmp_path}", "test")
    assert (len(test.frames), len(test.skipped), test.protocol.max_depth) == (1, 1, 80)
    shown, true = scored_view(read_view(test.frames[0]), KITTI)
    assert shown.shape == (352, 1216, 3)
    np.testing.assert_array_equal(shown, image[23:, 13:1229])
    np.testing.assert_allclose(true, depth[23:, 13:1229], atol=1 / 256)
    found = true.copy()
    top, bottom, left, right = (
        int(0.40810811 * 352),
        int(0.99189189 * 352),
        int(0.03594771 * 1216),
        int(0.96405229 * 1216),
    )
    inside = np.zeros(true.shape, bool)
    inside[top:bottom, left:right] = True
    found[~inside] = 50
    assert depth_metrics(found, true, 80.0, crop=KITTI.crop)["rmse"] == 0
    found[bottom - 1, right - 1] += 1
    assert depth_metrics(found, true, 80.0, crop=KITTI.crop)["rmse"] > 0
    view = read_view(open_depth(f"kitti:{tmp_path}", "train").frames[0])
    assert train_view(view, KITTI, np.random.default_rng(0)).image.shape == (352, 704, 3)


def test_sunrgbd(tmp_path):
    image, depth = ramp(730, 530)
    depth *= 1.5  # up to 10.5 metres
    millimetres = (1000 * depth).astype(np.uint16)
    save(
        tmp_path,
        "SUNRGBD/kv2/a/image/1.png",
        "SUNRGBD/kv2/a/depth/1.png",
        (millimetres << 3) | (millimetres >> 13),
        image,
    )
    (tmp_path / "SUNRGBD_val_splits.txt").write_text("SUNRGBD/kv2/a/image/1.png SUNRGBD/kv2/a/depth/1.png\n")
    test = open_depth(f"sunrgbd:{tmp_path}", "test")
    shown, true = scored_view(read_view(test.frames[0]), SUNRGBD)
    assert shown.shape == (640, 480, 3)
    np.testing.assert_allclose(true, depth.clip(max=8), atol=1e-3)
    with pytest.raises(DataError, match="--train-data"):
        open_depth(f"sunrgbd:{tmp_path}", "train")


def test_image_and_depth_are_moved_together(monkeypatch):
    monkeypatch.setattr(depth_sets, "GAMMA", (1.0, 1.0))
    monkeypatch.setattr(depth_sets, "COLOUR", (1.0, 1.0))
    image, depth = ramp(160, 120)
    protocol = replace(
        NYU, train_box=lambda width, height: (10, 10, 150, 110), train_size=(96, 64), brightness=(1.0, 1.0)
    )
    views = [train_view(View(image, None, depth), protocol, np.random.default_rng(seed)) for seed in range(40)]
    assert max(map(agree, views)) < 0.15  # a pixel is 0.02 m; bilinear at the border of a rotated image
    assert len({view.image.tobytes() for view in views}) > 30
    flipped = sum(bool(view.image[32, 10, 0] > view.image[32, 80, 0]) for view in views)
    assert 10 <= flipped <= 30
    turned = rotate(View(image, None, depth), 2.5)
    assert agree(View(turned.image[20:100, 20:140], None, turned.depth[20:100, 20:140])) < 0.1
    assert (turned.depth[[0, -1]] == 0).any()  # corners
    assert not np.array_equal(turned.depth, depth)
    with pytest.raises(DataError, match="160 x 120"):
        train_view(View(image, None, depth), NYU, np.random.default_rng(0))


def test_colours_change_and_geometry_does_not():
    image, depth = ramp(64, 48)
    protocol = replace(NYU, train_box=None, train_size=None)
    views = [train_view(View(image, None, depth), protocol, np.random.default_rng(seed)) for seed in range(60)]
    same = [view for view in views if np.array_equal(view.depth, depth)]
    assert any(np.array_equal(view.image, image) for view in same)
    changed = [view.image.mean() / image.mean() for view in same if not np.array_equal(view.image, image)]
    assert min(changed) < 0.95
    assert max(changed) > 1.05


def test_embedded_sets(tmp_path):
    (frame,) = open_depth("motorcycle", "test").frames
    view = read_view(frame)
    assert view.image.shape[:2] == view.depth.shape
    assert 1 < np.median(view.depth[view.depth > 0]) < 6  # metres
    for name, message in (
        ("nowhere", "nyu:/path"), ("nyu:", "nyu:/path"), (f"nyu:{tmp_path}", "nyu_test.txt"),
        (f"scenes:{tmp_path}", "no rendered scene"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            open_depth(name, "test")
    with pytest.raises(DataError, match="--size"):
        depth_sets.DepthSet("nyu", [], NYU).resized(64)


def test_frames_that_cannot_be_used(tmp_path):
    image, depth = ramp(64, 48)
    save(tmp_path, "a/good.png", "a/d_good.png", 1000 * depth, image)
    save(tmp_path, "a/zero.png", "a/d_zero.png", 0 * depth, image)
    save(tmp_path, "a/small.png", "a/d_small.png", 1000 * depth[::2, ::2], image)
    (tmp_path / "a/d_broken.png").write_bytes(b"no image")
    save(tmp_path, "a/broken.png", "a/other.png", depth, image)
    names = "good", "zero", "small", "broken", "missing"
    (tmp_path / "nyu_test.txt").write_text("".join(f"a/{name}.png a/d_{name}.png 500\n" for name in names))
    frames = {frame.key: frame for frame in open_depth(f"nyu:{tmp_path}", "test").frames}
    assert read_view(frames["a/good.png"]).size == (64, 48)
    for name, message in (("zero", "zero"), ("small", "32 x 24"), ("broken", "d_broken"), ("missing", "missing")):
        with pytest.raises(DataError, match=message):
            read_view(frames[f"a/{name}.png"])
    with pytest.raises(DataError, match="no depth map"):
        read_view(replace(frames["a/good.png"], depth=None))
    (tmp_path / "nyu_test.txt").write_text("a/good.png\n")
    with pytest.raises(DataError, match=r"nyu_test\.txt"):
        open_depth(f"nyu:{tmp_path}", "test")
