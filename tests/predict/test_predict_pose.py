"""`fastmum predict` of two images by a run of relative pose: text, JSON, picture, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image
from pose_runs import train_tiny
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation

from fastmum import load_encoder
from fastmum.predict.__main__ import main
from fastmum.predict.pose import describe
from fastmum.scenes import ensure_scenes, scene_dirs
from fastmum.tasks.pose.infer import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """On a frozen encoder whose patches of 16 px are resampled."""
    folder = tmp_path_factory.mktemp("runs")
    save_file(load_encoder("random:mum_tiny").state_dict(), folder / "encoder.safetensors")
    settings = f"encoder={folder / 'encoder.safetensors'}", "model.patch_size=8", "model.finetune=false"
    return train_tiny(folder / "tiny", "train.ema=0.5", *settings)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two rendered frames, of other sizes and aspects."""
    folder = tmp_path_factory.mktemp("photos")
    scene = scene_dirs(ensure_scenes(count=3, views=6, size=64, seed=0), 1)[0]
    files = [folder / "a.png", folder / "b.jpg"]
    for file, source, size in zip(files, sorted(scene.glob("*.png")), ((128, 96), (60, 90)), strict=False):
        Image.open(source).convert("RGB").resize(size).save(file)
    return files


def test_numbers_of_a_pose():
    """The second camera is turned 30 degrees to the right and 10 up, and stands behind and to the left."""
    R = Rotation.from_euler("YXZ", [30, 10, 0], degrees=True).as_matrix()
    forward = R[:, 2]
    assert forward[0] > 0 > forward[1], "x is right, y down"
    found = describe(R, np.array([-2.0, 0, -2.0]))
    assert [found[name] for name in ("yaw", "pitch", "roll")] == pytest.approx([30, 10, 0])
    assert (found["azimuth"], found["elevation"]) == pytest.approx((-135, 0))
    assert np.linalg.norm(found["translation_direction"]) == pytest.approx(1)
    assert found["rotation_angle"] == pytest.approx(np.degrees(Rotation.from_matrix(R).magnitude()))
    assert describe(np.eye(3), np.zeros(3))["translation_direction"] == [0, 0, 0]


def test_text_json_and_picture(run, photos, tmp_path, capsys):
    assert load_run(str(run)).model.encoder.config.patch_size == 8
    words = [str(run), *map(str, photos), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == [str(file) for file in photos]
    R = np.array(found["rotation"])
    assert np.allclose(R @ R.T, np.eye(3), atol=1e-5)
    assert np.linalg.norm(found["translation_direction"]) == pytest.approx(1)
    assert f"{found['rotation_angle']:.2f}" in text
    assert f"{found['translation_direction'][0]:.4f}" in text
    with Image.open(found["picture"]) as picture:
        assert picture.height > 320
        assert np.asarray(picture).std() > 10
    # The other way round is another prediction of the same model, not an inversion.
    assert main([str(run), *map(str, photos[::-1]), "--out", str(tmp_path / "out"), "--json"]) == 0
    assert not np.allclose(json.loads(capsys.readouterr().out)["rotation"], R)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "a-b-pose-2.jpg", "a-b-pose.jpg", "b-a-pose.jpg",
    ]  # fmt: skip


def test_what_cannot_be_predicted_is_one_clear_error(run, photos, tmp_path, capsys):
    black, broken, tiny = (tmp_path / f"{name}.png" for name in ("black", "broken", "tiny"))
    Image.new("RGB", (64, 48)).save(black)
    broken.write_bytes(b"no image")
    Image.linear_gradient("L").resize((2, 2)).save(tiny)
    a, b = photos
    for words, text in (
        ([run, a, black], "black.png"), ([run, a, broken], "broken.png"), ([run, a, tmp_path / "none.png"], "none.png"),
        ([run, a, tiny], "tiny.png"),
        ([run, a, b, "--size", "42"], "--size"), ([run, a, b, "--fov", "180"], "--fov"),
        ([tmp_path / "none", a, b], "none"), ([run, a, b, "--out", broken], "broken.png"),
    ):  # fmt: skip
        assert main([*map(str, words)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert text in error
    # A picture that is too wide for a JPEG, or cannot be written, leaves the numbers.
    wide = tmp_path / "wide.png"
    Image.linear_gradient("L").resize((9000, 40)).save(wide)
    assert main([str(run), str(a), str(wide), "--out", str(tmp_path), "--json"]) == 2
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (len(found["rotation"]), found["picture"]) == (3, None)
    assert "a-wide-pose.jpg" in printed.err
