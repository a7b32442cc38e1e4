"""Files of `fastmum predict`: COLMAP model, JSON, depth maps, PLY and GLB agree, for images of any size and turn."""

import json
import shutil
import struct

import numpy as np
import pycolmap
import pytest
import torch
from browser import chromium
from PIL import Image
from reconstruction_runs import train_tiny

from fastmum import load_encoder
from fastmum.data.colmap import read_model
from fastmum.engine.checkpoint import read_weights
from fastmum.engine.checkpoint.manifest import find_checkpoints
from fastmum.errors import FastmumError
from fastmum.geometry import Camera
from fastmum.geometry.camera import intrinsics_matrix
from fastmum.predict import reconstruction
from fastmum.predict.__main__ import main
from fastmum.predict.cloud import VERTEX, glb, ply
from fastmum.predict.viewer import frustum, viewer
from fastmum.scenes import ensure_scenes, scene_dirs
from fastmum.tasks.reconstruction.infer import estimate, load_run

SIZES = {"0.png": (128, 128), "1.png": (96, 64), "2.jpg": (64, 96), "3.png": (128, 128)}  # the third is turned by EXIF


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("runs") / "tiny", "train.ema=0.5")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Rendered frames of two sizes, one stored on its side."""
    folder = tmp_path_factory.mktemp("photos")
    scene = scene_dirs(ensure_scenes(count=3, views=6, size=64, seed=0), 1)[0]
    for (name, size), file in zip(SIZES.items(), sorted(scene.glob("*.png")), strict=False):
        stored, exif = size, Image.Exif()
        if name.endswith(".jpg"):
            stored, exif[0x0112] = size[::-1], 6
        Image.open(file).convert("RGB").resize(stored).save(folder / name, exif=exif)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def results(run, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    assert main([str(run), str(photos), "--out", str(out), "--max-points", "3000", "--no-page"]) == 0
    return out


def test_points_of_the_colmap_model_project_to_their_pixels(results):
    model = read_model(results / "sparse/0", coordinates=True)
    assert model.names == (*SIZES,)
    assert len(model.points) == len(model.xyz) == 3000
    for i, (pose, intrinsics, size) in enumerate(zip(model.poses, model.intrinsics, SIZES.values(), strict=True)):
        own = model.images == i
        points = model.xyz[model.points[own]] @ pose[:3, :3].T + pose[:3, 3]
        pixels = points @ intrinsics_matrix(*intrinsics).T
        found = model.positions[own]
        assert own.sum() > 100
        assert np.allclose(pixels[:, :2] / pixels[:, 2:], found, atol=1e-2)
        assert (found > 0).all()
        assert (found < size).all()
        assert (np.ptp(found, axis=0) > 0.7 * np.array(size)).all()
    read = pycolmap.Reconstruction(results / "sparse/0")
    assert (read.num_images(), read.num_points3D()) == (4, 3000)
    for image in read.images.values():
        assert (image.camera.width, image.camera.height) == SIZES[image.name]
        for point in image.get_observation_points2D()[:20]:
            xyz = read.points3D[point.point3D_id].xyz
            assert np.allclose(image.project_point(xyz), point.xy, atol=1e-2)


def test_json_depth_and_clouds_agree_with_the_model(results):
    model, content = (
        read_model(results / "sparse/0", coordinates=True),
        json.loads((results / "cameras.json").read_text()),
    )
    for i, frame in enumerate(content["frames"]):
        size = SIZES[frame["file"]]
        assert np.allclose(np.array(frame["K"])[[0, 1, 0, 1], [0, 1, 2, 2]], model.intrinsics[i])
        assert np.allclose(frame["T_cam_world"], model.poses[i], atol=1e-6)
        assert np.allclose(model.intrinsics[i, 2:], np.array(size) / 2)
        depth = np.asarray(Image.open(results / frame["depth"]))
        assert depth.dtype == np.uint16
        assert depth.shape == size[::-1]
        # The depth map at a point's pixel is about the point's depth: it was resized.
        own = model.images == i
        x, y = np.minimum(model.positions[own].astype(int), np.array(size) - 1).T
        z = model.xyz[model.points[own]] @ model.poses[i, 2, :3] + model.poses[i, 2, 3]
        assert np.median(np.abs(depth[y, x] * content["depth_unit"] / z - 1)) < 0.02
    head, _, body = (results / "cloud.ply").read_bytes().partition(b"end_header\n")
    vertices = np.frombuffer(body, VERTEX)
    assert f"element vertex {len(vertices)}".encode() in head
    assert np.allclose(vertices["xyz"], model.xyz, atol=1e-5)
    binary = (results / "cloud.glb").read_bytes()
    assert struct.unpack_from("<4sII", binary) == (b"glTF", 2, len(binary))
    length, kind = struct.unpack_from("<I4s", binary, 12)
    scene, start = json.loads(binary[20 : 20 + length]), 28 + length
    assert (kind, length % 4) == (b"JSON", 0)
    (position, colour), views = scene["accessors"], scene["bufferViews"]
    xyz = np.frombuffer(binary, "<f4", 3 * position["count"], start + views[0]["byteOffset"]).reshape(-1, 3)
    rgb = np.frombuffer(binary, "u1", 4 * colour["count"], start + views[1]["byteOffset"]).reshape(-1, 4)
    assert np.array_equal(xyz, vertices["xyz"])
    assert np.array_equal(rgb[:, :3], vertices["rgb"])
    assert position["min"] == xyz.min(0).tolist()
    assert start + scene["buffers"][0]["byteLength"] == len(binary)


def test_points_keep_to_percentile_bound_and_image(run, photos):
    trained = load_run(run)
    images = reconstruction.find_images([photos])
    read = reconstruction.read_photos(images, 64, trained.model.config.patch_size)
    assert images.skipped.keys() == {"broken.png"}
    assert {photo.image.shape for photo in read} == {(64, 64, 3)}
    assert [photo.size for photo in read] == [*SIZES.values()]
    found = estimate(trained.model, torch.from_numpy(np.stack([photo.image for photo in read])))
    cameras = [photo.camera(T, K) for photo, T, K in zip(read, found.camera_from_world, found.K, strict=True)]
    inside = np.concatenate([found.confidence[i][photo.inside].ravel() for i, photo in enumerate(read)])
    points = reconstruction.choose_points(read, cameras, found, 40.0, 10**9)
    assert len(points.xyz) == pytest.approx(0.6 * len(inside), abs=2)
    assert np.allclose(cameras[1].K[0, 0] / 96, found.K[1, 0, 0] / 64)
    # The whole input unprojected by `Estimate` has the same points.
    whole = found.world_points()[0].reshape(-1, 3)
    own = points.xyz[points.image == 0]
    assert np.abs(own[:, None] - whole[None]).sum(-1).min(1).max() < 1e-4 * np.abs(whole).max()


def test_results_replace_those_of_an_earlier_prediction(run, photos, results, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(results, out)
    for file in ("depth/my own.png", "view.html", "../outside.png"):
        (out / file).write_text("not listed")
    content = json.loads((out / "cameras.json").read_text())
    content["frames"].append({"depth": "depth/../../outside.png"})
    (out / "cameras.json").write_text(json.dumps(content))
    words = [str(run), str(photos / "1.png"), "--out", str(out), "--no-page"]
    assert main(words) == 0
    assert {file.name for file in (out / "depth").iterdir()} == {"1.png.png", "my own.png"}
    assert not (out / "view.html").exists()
    assert (tmp_path / "outside.png").exists()
    content.pop("run")  # as in cameras.json of a rendered scene
    content["frames"] = [{"depth": "depth/my own.png"}]
    (out / "cameras.json").write_text(json.dumps(content))
    assert main(words) == 0
    assert (out / "depth/my own.png").exists()


def test_one_pass_in_chunks_is_the_model_itself(run):
    trained = load_run(run)
    images = torch.randint(0, 256, (5, 48, 64, 3), dtype=torch.uint8)
    for head in trained.model.dense_heads():
        head.chunk = 2
    found = estimate(trained.model, images, points=True)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        expected = trained.model(images, [5])
    assert np.allclose(found.depth, expected.depth, rtol=1e-3)
    assert np.allclose(found.points, expected.points, rtol=1e-2, atol=1e-3)
    assert np.allclose(found.confidence, expected.points_confidence, rtol=1e-2)
    average = read_weights(run, prefix="ema.").tensors
    assert all(torch.equal(average[n], p) for n, p in trained.model.named_parameters() if not n.startswith("encoder."))


def test_what_cannot_be_predicted_is_one_clear_error(run, photos, tmp_path, capsys):
    with pytest.raises(FastmumError, match="other weights"):
        load_run(run, encoder="random:mum_vitb16")
    missing, other = tmp_path / "missing", tmp_path / "other"
    shutil.copytree(run, other)
    (found,) = find_checkpoints(other)
    found.manifest.values["task"] = "mum"
    found.manifest.write()
    with pytest.raises(FastmumError, match="task 'mum'"):
        load_run(other)
    for words, text in (
        ([missing, photos], "missing"),
        ([other, photos], "task 'mum'"),
        ([run, photos, "--size", "40"], "patch size"),
        ([run, photos, "--size", "0"], "0"),
        ([run, photos / "broken.png"], "broken.png"),
        ([run, photos, "--max-points", "0"], "--max"),
    ):
        assert main([*map(str, words), "--out", str(tmp_path / "out"), "--no-page"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert text in error


@pytest.mark.slow
def test_a_finetuned_encoder_comes_from_the_checkpoint(tmp_path):
    run = train_tiny(tmp_path / "finetuned", "model.finetune=true", "model.encoder_lr_scale=100")
    found, weights = load_run(run).model.encoder, read_weights(run).tensors
    names = [name for name, _ in found.named_parameters()]
    assert all(torch.equal(found.get_parameter(name), weights[f"encoder.{name}"]) for name in names)
    start = load_encoder("random:mum_tiny", trainable=True)
    assert any(not torch.equal(start.get_parameter(name), weights[f"encoder.{name}"]) for name in names)


def test_clouds_of_one_point():
    xyz, rgb = np.zeros((1, 3)), np.zeros((1, 3), np.uint8)
    assert len(ply(xyz, rgb).partition(b"end_header\n")[2]) == 15
    assert len(glb(xyz, rgb)) % 4 == 0


def screenshot(page, shot):
    assert 'src="http' not in page.read_text(encoding="utf-8")
    software = "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"
    chromium(page, *software, "--window-size=800,600", f"--screenshot={shot}")
    return np.asarray(Image.open(shot).convert("RGB")).astype(int)


@pytest.mark.slow
def test_the_page_of_a_prediction_opens_in_a_browser(run, photos, tmp_path):
    pytest.importorskip("plotly")
    assert main([str(run), str(photos), "--out", str(tmp_path), "--max-points", "3000"]) == 0
    page = (tmp_path / "view.html").read_text(encoding="utf-8")
    assert all(name in page for name in SIZES)
    assert len(np.unique(screenshot(tmp_path / "view.html", tmp_path / "shot.png").reshape(-1, 3), axis=0)) > 100


@pytest.mark.slow
def test_the_page_shows_cloud_and_cameras_in_a_browser(tmp_path):
    pytest.importorskip("plotly")
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-1, 1, (20_000, 3)) + (0, 0, 3)
    rgb = np.tile(np.uint8([0, 160, 0]), (len(xyz), 1))
    shift = np.eye(4)
    shift[0, 3] = 1.5
    cameras = [Camera(intrinsics_matrix(50, 50, 32, 24), pose, (64, 48)) for pose in (np.eye(4), shift)]
    corners = frustum(cameras[1], 0.5) @ shift[:3, :3].T + shift[:3, 3]
    assert np.allclose(corners[corners[:, 2] > 0.1][0] @ cameras[1].K.T, [0, 0, 0.5])
    page, shot = tmp_path / "view.html", tmp_path / "shot.png"
    page.write_text(viewer(xyz, rgb, cameras, ["a.png", "</script>.png"], "a & b"), encoding="utf-8")
    pixels = screenshot(page, shot)
    green = (pixels[..., 1] > pixels[..., 0] + 60) & (pixels[..., 1] > pixels[..., 2] + 60)
    red = (pixels[..., 0] > pixels[..., 1] + 60) & (pixels[..., 0] > pixels[..., 2] + 60)
    blue = pixels[..., 2] > pixels[..., 0] + 60
    assert green.mean() > 0.05
    assert red.sum() > 30
    assert blue.sum() > 30
