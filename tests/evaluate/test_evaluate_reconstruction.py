"""Evaluation of reconstruction: the truth scores perfectly, errors by hand, layouts of public sets, the command."""

import gzip
import json

import numpy as np
import pytest
from PIL import Image
from plane_world import shot
from reconstruction_runs import train_tiny

from fastmum.data.build import build
from fastmum.data.evaluation import evaluation_batch
from fastmum.data.manifest import Manifests
from fastmum.data.samples import manifest_frame
from fastmum.evaluate.__main__ import main
from fastmum.evaluate.reconstruction import PROTOCOLS, Protocol, evaluate_reconstruction, open_set
from fastmum.geometry.camera import rigid_inverse, transform, unproject
from fastmum.scenes import ensure_scenes
from fastmum.tasks.reconstruction.infer import Estimate

SCALE = 0.2  # of the stand-in's world


@pytest.fixture(scope="module")
def rendered():
    return ensure_scenes(count=4, views=12, size=64, seed=2025)


def stand_in(batch):
    """The truth, in another world and unit."""
    turn = shot((0.4, -0.3, 0.2), (0.3, 0.5, -1.0)).T
    T = batch.camera_from_world.double().numpy() @ turn
    T[:, :3, 3] *= SCALE
    depth, K = SCALE * batch.depth.numpy(), batch.intrinsics.double().numpy()
    points = np.stack([transform(rigid_inverse(t), unproject(d, k)) for t, d, k in zip(T, depth, K, strict=True)])
    return Estimate(T, K, depth, np.ones_like(depth), points.astype(np.float32))


def test_the_truth_scores_perfectly_and_a_turned_camera_does_not(rendered, tmp_path):
    name, protocol, manifests = open_set(f"scenes:{rendered}", tmp_path)
    assert (name, protocol) == (f"{rendered.name} (folder)", PROTOCOLS["scenes"])
    found = evaluate_reconstruction(stand_in, manifests, protocol, 64, 16, most=2, pictures=1)
    scores = found.numbers["scores"]
    assert [scores[f"auc{t}"] for t in (30, 15, 5, 3)] == [100] * 4
    for kind in ("acc_mean", "comp_mean", "acc_median", "comp_median", "abs_rel"):
        assert scores[kind] < 1e-4, kind  # metres
    assert scores["nc_mean"] > 0.999
    assert (found.numbers["pairs"], found.numbers["set_pairs"], found.numbers["groups"]) == (2, 4, 2)
    (picture,) = found.pictures
    assert np.asarray(picture).std() > 10

    def infinite(batch):
        """One point of each frame is not finite, as of heads that diverge."""
        estimate = stand_in(batch)
        estimate.points[:, 30, 30] = np.inf
        return estimate

    again = evaluate_reconstruction(infinite, manifests, protocol, 64, 16, most=2, pictures=1)
    assert len(again.pictures) == 1
    assert again.numbers["scores"]["acc_mean"] < 1e-4

    def turned(batch):
        """The first camera by 10 degrees about its vertical axis: 9 of 45 pairs are wrong."""
        estimate, angle = stand_in(batch), np.radians(10)
        turn = np.eye(4)
        turn[[0, 0, 2, 2], [0, 2, 0, 2]] = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
        poses = estimate.camera_from_world.copy()
        poses[0] = turn @ poses[0]
        return estimate._replace(camera_from_world=poses)

    worse = evaluate_reconstruction(turned, manifests, protocol._replace(threshold=None), 64, 16, most=2)
    scores = worse.numbers["scores"]
    # The histogram of VGGT: 36 pairs below 1 degree, 9 with a rotation error of 10 (and a larger or smaller direction).
    assert [scores["auc5"], scores["auc3"]] == pytest.approx([80, 80])
    assert 80 < scores["auc30"] <= 100 * (36 + 9 * 21 / 30) / 45
    assert "acc_mean" not in scores


def test_groups_are_averaged_after_pooling_their_pairs(rendered, tmp_path):
    _, _, manifests = open_set(f"scenes:{rendered}", tmp_path)
    _, protocol, _ = open_set(f"scenes:{rendered}", tmp_path)
    good = set()

    def sometimes(batch):
        found = stand_in(batch)
        good.add(batch.names[0])
        return found if len(good) < 3 else found._replace(camera_from_world=found.camera_from_world[::-1].copy())

    found = evaluate_reconstruction(sometimes, manifests, protocol._replace(threshold=None), 64, 16)
    each = [scores["auc30"] for scores in found.numbers["per_sequence"].values()]
    assert each[:2] == [100, 100]
    assert each[2] < 90
    assert found.numbers["scores"]["auc30"] == pytest.approx(np.mean(each))


def wall_shots(count):
    return [shot((0.02 * i, 0.01 * i, 0), (0.1 * i, -0.02 * i, 0.01 * i)) for i in range(count)]


def test_dtu_has_every_fifth_frame_in_eroded_masks(tmp_path):
    scan = tmp_path / "dtu/scan4"
    for name in ("images", "depths", "binary_masks", "cams"):
        (scan / name).mkdir(parents=True)
    shots = wall_shots(12)
    for i, each in enumerate(shots):
        each.image().save(scan / f"images/{i:08d}.jpg")
        np.save(scan / f"depths/{i:08d}.npy", each.depth())
        mask = np.zeros(each.size[::-1], np.uint8)
        mask[10:40, 8:50] = 255
        Image.fromarray(mask).save(scan / f"binary_masks/{i:08d}.png")
        K = each.K.copy()
        lines = ["extrinsic", *(" ".join(map(str, row)) for row in each.T), "", "intrinsic"]
        lines += [*(" ".join(map(str, row)) for row in K), "", "425 2.5"]
        (scan / f"cams/{i:08d}_cam.txt").write_text("\n".join(lines))
    name, protocol, manifests = open_set(f"dtu:{tmp_path / 'dtu'}", tmp_path)
    assert (name, protocol.threshold, protocol.frames) == ("dtu", 100, None)
    assert [manifests.file(row).stem for row in range(manifests.num_frames)] == ["00000000", "00000005", "00000010"]
    batch = evaluation_batch(manifests, [0, 1], 64, 16, erode=protocol.erode)
    # A square of 10 pixels whose centre is its sixth: 5 are lost at the top and left, 4 at the bottom and right.
    rows, columns = np.nonzero(batch.valid[1].numpy())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 35, 13, 45)
    found = evaluate_reconstruction(stand_in, manifests, protocol, 64, 16)
    assert found.numbers["scores"]["acc_median"] < 1e-4
    assert found.numbers["scores"]["auc3"] == 100
    assert found.numbers["settings"]["frames"] == "all"


def test_eth3d_has_raw_depth_and_cameras_in_archives(tmp_path):
    scene = tmp_path / "eth3d/kicker"
    shots = wall_shots(7)
    folders = [scene / "images/custom_undistorted", scene / "ground_truth_depth/custom_undistorted"]
    for folder in (*folders, scene / "custom_undistorted_cam"):
        folder.mkdir(parents=True)
    for i, each in enumerate(shots):
        each.image().save(folders[0] / f"DSC_{i}.JPG", "JPEG")
        depth = each.depth()
        depth[0, 0] = np.inf
        depth.astype("<f4").tofile(folders[1] / f"DSC_{i}.JPG")
        np.savez(scene / f"custom_undistorted_cam/DSC_{i}.npz", intrinsics=each.K, extrinsics=each.T[:3])
    _, protocol, manifests = open_set(f"eth3d:{tmp_path / 'eth3d'}", tmp_path)
    assert manifests.num_frames == 2
    view = manifest_frame(manifests, 1).view()
    assert view.depth[0, 0] == 0
    assert np.allclose(view.depth[1:], shots[5].depth()[1:])
    assert np.allclose(view.camera.K, shots[5].K)
    assert np.allclose(view.camera.camera_from_world, shots[5].T, atol=1e-6)
    assert evaluate_reconstruction(stand_in, manifests, protocol, 64, 16).numbers["scores"]["comp_median"] < 1e-4


def test_co3d_has_the_test_list_in_its_order_without_bad_viewpoints(tmp_path):
    category = tmp_path / "apple"
    (category / "set_lists").mkdir(parents=True)
    R, size = np.eye(3).tolist(), [48, 64]
    frames, listed = [], []
    for video, far in (("a", 0.0), ("b", 0.0), ("c", 2e5)):
        for number in range(12):
            viewpoint = {"R": R, "T": [0.0, far, number], "focal_length": [1.0, 1.0], "principal_point": [0.0, 0.0]}
            image = {"path": f"apple/{video}/{number}.jpg", "size": size}
            frames.append({"sequence_name": video, "frame_number": number, "image": image, "viewpoint": viewpoint})
            listed.append([video, number, image["path"]])
    sequences = [
        {"sequence_name": name, "viewpoint_quality_score": q} for name, q in (("a", 0.9), ("b", 0.4), ("c", 1))
    ]
    for name, content in (("frame", frames), ("sequence", sequences)):
        with gzip.open(category / f"{name}_annotations.jgz", "wt") as stream:
            json.dump(content, stream)
    lists = category / "set_lists/set_lists_fewview_dev.json"
    lists.write_text(json.dumps({"train": [], "test": listed[11::-1][:11] + listed[12:]}))
    (tmp_path / "keyboard").mkdir()
    build("co3d_test", tmp_path, tmp_path / "co3d.arrow")
    manifests = Manifests([tmp_path / "co3d.arrow"])
    assert manifests.num_sequences == 1
    assert manifests.sequence_name(0) == "apple/a"
    assert [manifests.file(row).stem for row in range(manifests.num_frames)] == [str(n) for n in range(11, 0, -1)]


def test_realestate10k_has_whole_test_clips(tmp_path):
    clip = tmp_path / "test/0123456789abcdef"
    clip.mkdir(parents=True)
    shots, lines = wall_shots(11), ["https://www.youtube.com/watch?v=a"]
    for i, each in enumerate(shots):
        each.image().save(clip / f"{1000 * i}.png")
        K = each.K / [[each.size[0]], [each.size[1]], [1]]
        lines.append(" ".join(map(str, [1000 * i, K[0, 0], K[1, 1], K[0, 2], K[1, 2], 0, 0, *each.T[:3].ravel()])))
    clip.with_suffix(".txt").write_text("\n".join(lines))
    name, protocol, manifests = open_set(f"realestate10k_test:{tmp_path}", tmp_path)
    assert (name, protocol, manifests.num_sequences, manifests.num_frames) == (name, Protocol(), 1, 11)
    camera = manifest_frame(manifests, 7).read_camera()
    assert np.allclose(camera.K, shots[7].K, rtol=1e-5)
    assert np.allclose(camera.camera_from_world, shots[7].T, atol=1e-6)
    assert evaluate_reconstruction(stand_in, manifests, protocol, 64).numbers["scores"]["auc3"] == 100


def test_the_command_evaluates_a_run_and_refuses_others(rendered, tmp_path, capsys):
    run = train_tiny(tmp_path / "tiny", "train.picture_every=1")
    assert Image.open(run / "reconstruction.png").width > 800
    words = ["reconstruction", "--weights", str(run), "--data", f"scenes:{rendered}", "--max-pairs", "1"]
    assert main([*words, "--out", str(tmp_path / "out"), "--pictures", "1"]) == 0
    (file,) = (tmp_path / "out").glob("*.json")
    content = json.loads(file.read_text())
    assert content["settings"]["size"] == 64
    assert 0 <= content["scores"]["auc30"] <= 100
    assert content["scores"]["acc_mean"] > 0.001
    page = (tmp_path / "out/report.html").read_text()
    assert "AUC@30" in page
    assert "71.5" in page  # the paper's, on CO3D
    assert "data:image/jpeg" in page
    table = (tmp_path / "out/table.md").read_text()
    assert "3.7 / 1.6" in table
    capsys.readouterr()
    for change, text in (
        (["--data", "nowhere"], "KIND:PATH"),
        (["--size", "40"], "40"),
        (["--set", "ema=off"], "--set"),
    ):
        assert main([*words, *change, "--out", str(tmp_path / "out")]) == 2
        assert text in capsys.readouterr().err
    manifests = open_set(f"scenes:{rendered}", tmp_path).manifests
    with pytest.raises(Exception, match="99 frames"):
        evaluate_reconstruction(stand_in, manifests, Protocol(frames=99), 64)
