"""Reading COLMAP models, and their builders, on miniatures with sequences computed by hand and on real models."""

import math
import shutil
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmum.data.colmap import CAMERAS, read_model
from fastmum.data.depth import DepthFormat
from fastmum.data.errors import DataError

# An image: ids of the points it sees, and the heading of its camera about the vertical, in degrees.
View = namedtuple("View", "points heading", defaults=[0])


def write_text_model(folder, views):
    """The three files; images are numbered 1, 2, ..., and the origin lies 1 in front of each camera."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.txt").write_text("# a comment\n1 PINHOLE 640 480 500 510 320 240\n")
    images, tracks = "", {}
    for number, (name, view) in enumerate(views.items(), start=1):
        half = math.radians(view.heading) / 2
        features = "".join(f" {10 * i} 5 {point}" for i, point in enumerate(view.points))
        images += f"{number} {math.cos(half)} 0 {math.sin(half)} 0 0 0 1 1 {name}\n"
        images += f"1 1 -1{features}\n"  # the first feature has no point
        for i, point in enumerate(view.points, start=1):
            tracks[point] = f"{tracks.get(point, '')} {number} {i}"
    (folder / "images.txt").write_text(images)
    (folder / "points3D.txt").write_text("".join(f"{p} 0 0 9 0 0 0 0.5{track}\n" for p, track in tracks.items()))
    return folder


def convert_to_binary(folder, rigs=True):
    """Replace a text model by a binary one, without rigs and frames as COLMAP wrote it before version 3.12."""
    reconstruction = pytest.importorskip("pycolmap").Reconstruction(folder)
    for file in folder.iterdir():
        file.unlink()
    reconstruction.write_binary(folder)
    for name in () if rigs else ("rigs", "frames"):
        (folder / f"{name}.bin").unlink()
    return folder


class TestReading:
    @pytest.fixture(params=["text", "binary", "binary with rigs"])
    def folder(self, request, tmp_path):
        views = {"b.jpg": View((7, 3, 9), 90), "sub/a.jpg": View((9, 3, 3)), "c.jpg": View(())}
        folder = write_text_model(tmp_path / "model", views)
        return folder if request.param == "text" else convert_to_binary(folder, rigs=request.param != "binary")

    def test_images_points_and_cameras_by_hand(self, folder, tmp_path):
        def seen(model):
            return [sorted(model.points[model.images == i].tolist()) for i in range(len(model.names))]

        if not (folder / "images.txt").exists():  # binary files come first
            shutil.copytree(write_text_model(tmp_path / "other", {"x.jpg": View((1,))}), folder, dirs_exist_ok=True)
        model = read_model(folder)
        assert model.names == ("b.jpg", "sub/a.jpg", "c.jpg")
        assert seen(model) == [[0, 1, 2], [0, 0, 2], []]  # points 3, 7 and 9
        assert model.intrinsics.tolist() == [[500, 510, 320, 240]] * 3
        quarter = [
            [0, 0, 1, 0],
            [0, 1, 0, 0],
            [-1, 0, 0, 1],
            [0, 0, 0, 1],
        ]  # x_camera = z_world, z_camera = 1 - x_world
        assert model.poses[0] == pytest.approx(np.array(quarter), abs=1e-12)
        assert model.poses[1] == pytest.approx(np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]))
        some = model.select(np.array([False, True, True]))
        assert some.names == ("sub/a.jpg", "c.jpg")
        assert seen(some) == [[0, 0, 2], []]
        assert len(some.poses) == len(some.intrinsics) == 2

    def test_camera_models_and_rotations(self, tmp_path):
        """Every model that pycolmap knows, with parameters 1, 2, 3 ..., and a random quaternion."""
        pycolmap = pytest.importorskip("pycolmap")
        q = np.random.default_rng(0).normal(size=4)
        rotation = pycolmap.Rotation3d((q / np.linalg.norm(q))[[1, 2, 3, 0]]).matrix()
        for number, (name, count, focal) in enumerate(CAMERAS):
            if name not in pycolmap.CameraModelId.__members__:
                continue  # of a newer COLMAP
            camera = pycolmap.Camera(model=name, width=640, height=480, params=np.arange(1.0, count + 1))
            K = [np.nan] * 4
            if focal:
                K = [camera.focal_length_x, camera.focal_length_y, camera.principal_point_x, camera.principal_point_y]
            folder = write_text_model(tmp_path / name, {"a.jpg": View((1,))})
            (folder / "cameras.txt").write_text(f"1 {name} 640 480 {' '.join(map(str, camera.params))}\n")
            images = (folder / "images.txt").read_text().replace("1.0 0 0.0 0", " ".join(map(str, q)))
            (folder / "images.txt").write_text(images)
            assert int(pycolmap.CameraModelId.__members__[name]) == number
            for model in (read_model(folder), read_model(convert_to_binary(folder))):
                assert np.array_equal(model.intrinsics, [K], equal_nan=True), name
                assert model.poses[0, :3, :3] == pytest.approx(rotation)

    def test_missing_and_broken_files_are_named_in_one_line(self, folder):
        def refused(words):
            with pytest.raises(DataError, match=rf"^[^\n]*{folder}[^\n]*$") as caught:
                read_model(folder)
            assert words in str(caught.value)

        suffix = next(folder.iterdir()).suffix
        images, cameras, points = (folder / f"{name}{suffix}" for name in ("images", "cameras", "points3D"))
        for file in (images, cameras):
            whole = file.read_bytes()
            for content in (b"\xff" * len(whole), whole[: len(whole) // 2], whole + b"1 2 3 4 5 6 7 8"):
                file.write_bytes(content)
                refused(file.name)
            file.write_bytes(whole)
        if suffix == ".bin":
            whole = points.read_bytes()
            for content in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"\xff" * 8 + whole[8:]):
                points.write_bytes(content)
                refused(points.name)
        points.write_bytes(b"")
        cameras.unlink()
        refused(f"{cameras.name}, {points.name} missing or empty")
        shutil.rmtree(folder)
        refused("No such file")

    def test_unknown_cameras_and_focal_lengths_of_zero_are_refused(self, tmp_path):
        folder = write_text_model(tmp_path / "model", {"a.jpg": View((1,))})
        cameras = folder / "cameras.txt"
        for camera in ("2 PINHOLE 640 480 500 510 320 240", "1 MAGIC 640 480 1 2", "1 PINHOLE 640 480 0 0 0 0"):
            cameras.write_text(f"{camera}\n")
            with pytest.raises(DataError, match=rf"^[^\n]*{folder}[^\n]*camera|focal"):
                read_model(folder)
        cameras.write_text("1 SIMPLE_PINHOLE 640 480 500 320 240\n")
        binary = convert_to_binary(folder) / "cameras.bin"
        whole = binary.read_bytes()
        for number in (-1, len(CAMERAS)):  # of the camera model
            binary.write_bytes(whole[:12] + number.to_bytes(4, "little", signed=True) + whole[16:])
            with pytest.raises(DataError, match=r"cameras\.bin.*camera model"):
                read_model(folder)

    def test_names_with_spaces_images_without_points_and_images_registered_twice(self, tmp_path, caplog):
        views = {"a.jpg": View((1, 2)), "the  door ü.jpg": View((2,), 90), "again": View((1, 5), 180)}
        folder = write_text_model(tmp_path / "model", views)
        text = (folder / "images.txt").read_text().replace("again", "a.jpg")
        text += "4 1 0 0 0 0 0 1 1 no point.jpg\n\n5 1 0 0 0 0 0 1 1 sub\\last.jpg\n"
        for stated in (5, 6):  # in the header; the file has 5
            assert "images.txt" not in caplog.text
            content = f"\ufeff# Number of images: {stated}, mean observations per image: 1\n{text}"
            (folder / "images.txt").write_bytes(content.replace("\n", "\r\n").encode())
            model = read_model(folder)
        assert f"'{folder / 'images.txt'}'" in caplog.text
        assert model.names == ("a.jpg", "the  door ü.jpg", "no point.jpg", "sub/last.jpg")
        assert model.images.tolist() == [0, 0, 1]
        assert model.poses[0, 0, 0] == 1, "the first pose of a.jpg"
        assert f"1 of 5 images of '{folder}'" in caplog.text


# Shared points: ab 3, ac 2, bc 2, cd 1, and e, whose file is missing in tests, shares most.
CROWD = {
    "a.jpg": View((1, 2, 3, 4)),
    "b.jpg": View((1, 2, 3, 5), 90),
    "e.jpg": View((1, 2, 3, 4, 5, 6)),
    "c.jpg": View((3, 4, 5, 6)),
    "d.jpg": View((6,)),
}
CHAINS = {"a": "abcd", "b": "bacd", "c": "cab", "d": "dcab"}

# From s (20 points): a scores 4/20 x 4 cos 60 (1 - cos 60) = .2, b 8/20 x .464 = .186, c turns by less than 10 degrees,
# and d shares less than a tenth. From a: c shares all four. From c (18 points): b shares 8. d stays unused.
TOUR = {
    "b.jpg": View(tuple(range(4, 12)), 30),
    "s.jpg": View(tuple(range(20))),
    "a.jpg": View((0, 1, 2, 3), 60),
    "d.jpg": View((19, 30, 31), 60),
    "c.jpg": View(tuple(range(18)), 5),
}
TOUR_BY_NAME = ["s.jpg", "a.jpg", "c.jpg", "b.jpg"]


def letters(frames):
    return "".join(Path(frame).stem for frame in frames)


def named(made, frames):
    return next(name for name, found in made.sequences.items() if letters(found) == frames)


def project(point, pose, intrinsics):
    x, y, z, _ = pose @ point
    fx, fy, cx, cy = intrinsics
    return fx * x / z + cx, fy * y / z + cy


class TestMegaDepth:
    @pytest.fixture(autouse=True)
    def scenes(self, raw, add):
        for scene in ("0000", "0015"):
            write_text_model(raw / f"Undistorted_SfM/{scene}/sparse-txt", CROWD)
            add(*(f"Undistorted_SfM/{scene}/images/{name}.jpg" for name in "abcd"))
        add("Undistorted_SfM/0001/images/a.jpg")  # could not be undistorted

    def test_chains(self, found):
        made = found("megadepth")
        assert Counter(name.split("/")[0] for name in made.sequences) == {"0000": 1000, "0015": 1000}
        for name, frames in made.sequences.items():
            assert all(frame.startswith(f"Undistorted_SfM/{name[:4]}/images/") for frame in frames)
            assert letters(frames) == CHAINS[letters(frames)[0]]
        anchors = Counter(letters(frames)[0] for frames in made.sequences.values())
        assert anchors == pytest.approx(dict.fromkeys("abcd", 500), abs=80), "drawn evenly"
        assert made.manifest.metadata["rule"] == "paper"
        assert made.manifest.metadata["options"]["sequences"] == 1000

    def test_scenes_draw_apart_and_by_the_seed(self, found):
        def anchors(scene, **options):
            made = found("megadepth", sequences=30, **options)
            return "".join(letters(frames)[0] for name, frames in made.sequences.items() if name[:4] == scene)

        assert len({anchors(scene, seed=seed) for scene in ("0000", "0015") for seed in (0, 1)}) == 4
        assert anchors("0015", exclude="0000") == anchors("0015")

    def test_scenes_by_a_list(self, found, tmp_path, caplog):
        listed = tmp_path / "scenes.txt"
        listed.write_text("0015\n0000\n7777\n")
        assert {name[:4] for name in found("megadepth", scenes=str(listed), sequences=3).sequences} == {"0000", "0015"}
        assert "7777" in caplog.text
        found("megadepth", scenes=str(listed), exclude="0015", sequences=3)
        for content in ("0022", ""):
            listed.write_text(content)
            with pytest.raises(DataError, match=r"^[^\n]*scenes\.txt[^\n]*$"):
                found("megadepth", scenes=str(listed))
        with pytest.raises(DataError, match=r"none\.txt' cannot be read as a list of scenes"):
            found("megadepth", scenes=str(tmp_path / "none.txt"))

    def test_released(self, found):
        # Four of five images are there, so a draw of the fifth is lost; from d, which shares with c, the order is a, b.
        made = found("megadepth", rule="released", sequences=50, length=4)
        nearest = {"a": "abcd", "b": "bacd", "c": "cabd", "d": "dcab"}
        assert 50 < len(made.sequences) < 100
        assert all(letters(frames) == nearest[letters(frames)[0]] for frames in made.sequences.values())
        with pytest.raises(DataError, match="makes a sequence of megadepth"):
            found("megadepth", rule="released")  # no scene of 256 images

    def test_cameras_and_depth_maps_but_no_foreground_masks(self, found, raw):
        for scene, name, size in (("0000", "a", 100 * 1024), ("0000", "b", 100 * 1024 - 1), ("0015", "b", 1 << 17)):
            file = raw / f"phoenix/S6/zl548/MegaDepth_v1/{scene}/dense0/depths/{name}.h5"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(size))
        made = found("megadepth", sequences=30, exclude="0015")
        name = named(made, "abcd")
        model = read_model(raw / "Undistorted_SfM/0000/sparse-txt")
        assert np.allclose(made.poses(name)[:2], model.poses[:2])
        assert made.intrinsics(name)[0].tolist() == [500, 510, 320, 240]
        assert made.depths(name) == ["phoenix/S6/zl548/MegaDepth_v1/0000/dense0/depths/a.h5", None, None, None]
        assert made.depth_formats(name) == {DepthFormat("hdf5", 1.0, "z")}
        assert not any(found("megadepth", poses=False, depth=False, sequences=9).manifest.known.values())

    def test_what_is_left_out(self, raw, found, tmp_path, caplog):
        """Short chains, scenes without images, and on request scenes of broken models."""
        made = found("megadepth", sequences=40, min_frames=4, exclude="0015, 0022")
        assert {letters(frames) for frames in made.sequences.values()} == {"abcd", "bacd", "dcab"}
        for part in ("skipped 1 scenes without a folder sparse-txt", "do not exist: 0022", "1 of 5 images"):
            assert part in caplog.text
        scene = raw / "Undistorted_SfM/0015"
        (scene / "images").rename(scene / "elsewhere")
        for rule in ("paper", "released"):
            assert {name[:4] for name in found("megadepth", rule=rule, sequences=9, length=3).sequences} == {"0000"}
        (scene / "sparse-txt/images.txt").unlink()
        (tmp_path / "megadepth.arrow").unlink()
        with pytest.raises(DataError, match=r"0015/sparse-txt' is not whole: images.txt.*--broken skip"):
            found("megadepth")
        assert not (tmp_path / "megadepth.arrow").exists()
        assert {name[:4] for name in found("megadepth", broken="skip").sequences} == {"0000"}
        assert "skipped: the COLMAP model" in caplog.text


class TestMegaScenes:
    @pytest.fixture(autouse=True)
    def scenes(self, raw, add):
        in_category = {f"commons/Tower/0/pictures/{name}": view for name, view in TOUR.items()}
        convert_to_binary(write_text_model(raw / "reconstruct/001/234/colmap/0", in_category), rigs=False)
        convert_to_binary(write_text_model(raw / "reconstruct/001/234/colmap/1", CROWD), rigs=False)
        add(*(f"images/001/234/{name}" for name in in_category), *(f"images/001/234/{name}" for name in CROWD))

    def test_chain(self, raw, add, found):
        with pytest.raises(DataError, match="makes a sequence of megascenes"):
            found("megascenes")  # under 24 views
        made = found("megascenes", min_frames=4)
        prefix = "images/001/234/commons/Tower/0/pictures"
        assert made.sequences == {"001/234/0/000": [f"{prefix}/{name}" for name in TOUR_BY_NAME]}
        (raw / "images/001/234/commons/Tower/0/pictures/a.jpg").unlink()
        # From s: b; from b (8 points): c, which turns by 25 degrees.
        assert letters(found("megascenes", min_frames=3).sequences["001/234/0/000"]) == "sbc"

    def test_released_takes_models_of_twelve_images_whole(self, raw, add, found):
        with pytest.raises(DataError, match="makes a sequence of megascenes"):
            found("megascenes", rule="released")
        views = {f"{i}.jpg": View((i,)) for i in range(12)}
        convert_to_binary(write_text_model(raw / "reconstruct/000/007/sparses/3", views))
        add(*(f"images/000/007/{name}" for name in views))
        made = found("megascenes", rule="released")
        assert made.sequences == {"000/007/3/000": [f"images/000/007/{name}" for name in views]}


class TestAnyModel:
    @pytest.mark.parametrize(
        ("model", "images"), [("tour/sparse/0", "tour/images/"), ("tour", "tour/images/"), (".", "")]
    )
    def test_images_are_found_next_to_or_above_the_model(self, raw, add, found, model, images):
        write_text_model(raw / model, TOUR)
        add(*(f"{images}{name}" for name in TOUR))
        name = "raw/000" if model == "." else f"{model}/000"
        made = found("colmap", chain="angle", min_frames=3)
        assert made.sequences == {name: [f"{images}{name}" for name in TOUR_BY_NAME]}

    def test_overlap_is_the_default(self, raw, add, found):
        write_text_model(raw / "crowd/sparse/0", CROWD)
        add(*(f"crowd/images/{name}.jpg" for name in "abcd"))
        made = found("colmap", sequences=30)
        assert {letters(f)[0]: letters(f) for f in made.sequences.values()} == CHAINS
        made = found("colmap", sequences=30, rule="released", length=2)
        assert {letters(f) for f in made.sequences.values()} == {"ab", "ba", "ca", "dc"}
        made = found("colmap", chain="angle", rule="released", min_frames=4)
        assert {letters(f) for f in made.sequences.values()} == {"abcd"}

    def test_models_by_pattern_and_images_by_folder(self, raw, add, found, caplog):
        for scene in ("one", "two"):
            write_text_model(raw / "models" / scene / "sparse/0", TOUR)
            write_text_model(raw / "models" / scene / "dense/sparse", TOUR)
        add(*(f"photos/one/{name}" for name in TOUR))
        add(*(f"photos/two/{name}" for name in TOUR))
        for scene in ("one", "two"):
            made = found("colmap", chain="angle", min_frames=3, models=f"*/{scene}/sparse/0", images=f"photos/{scene}")
            assert made.sequences == {f"models/{scene}/sparse/0/000": [f"photos/{scene}/{n}" for n in TOUR_BY_NAME]}
        with pytest.raises(DataError, match="makes a sequence of colmap"):
            found("colmap", models="models/one/sparse/0")
        assert "--images" in caplog.text

    @pytest.mark.parametrize("images", ["images/", ""])
    def test_images_of_several_models_are_taken_once(self, raw, add, found, images, caplog):
        """The second copy of a model adds nothing; another model only its own images; one scene a place."""
        for model in ("sparse/0", "sparse_txt", "undistorted/sparse"):
            write_text_model(raw / "crowd" / model, CROWD)
        write_text_model(raw / "crowd/sparse/1", {f"{name}.jpg": View((1, 2, 3)) for name in "abxyz"})
        write_text_model(raw / "tour/sparse", TOUR)
        add(*(f"crowd/{images}{name}.jpg" for name in "abcdxyz"), *(f"tour/{images}{name}" for name in TOUR))
        made = found("colmap", sequences=20)
        models = {name.rpartition("/")[0]: set() for name in made.sequences}
        for name, frames in made.sequences.items():
            models[name.rpartition("/")[0]] |= {*letters(frames)}
        assert models == {"crowd/sparse/0": {*"abcd"}, "crowd/sparse/1": {*"xyz"}, "tour/sparse": {*"sabcd"}}
        assert "2 of 5 images" in caplog.text
        places = {name: made.manifest.scene_names(np.array([i]))[0] for i, name in enumerate(made.sequences)}
        assert {name.partition("/")[0] for name in places} == {"crowd", "tour"}
        assert all(place == f"{name.partition('/')[0]}/{images}".rstrip("/") for name, place in places.items())

    def test_cameras_turn_with_images_and_dense_depth_is_found(self, raw, add, found):
        """Images of 640 x 480 with an EXIF orientation; a point keeps its place in the picture."""
        write_text_model(raw / "dense/sparse", CROWD)
        places = {1: lambda u, v: (u, v), 3: lambda u, v: (640 - u, 480 - v), 6: lambda u, v: (480 - v, u),
                  8: lambda u, v: (v, 640 - u)}  # fmt: skip
        (raw / "dense/images").mkdir()
        stored = read_model(raw / "dense/sparse")
        for tags in ((1, 6, 8, 2), (3, 1, 5, 7)):
            for letter, tag in zip("abcd", tags, strict=True):
                exif = Image.Exif()
                exif[0x0112] = tag
                Image.new("RGB", (640, 480)).save(raw / f"dense/images/{letter}.jpg", exif=exif)
                add(f"dense/stereo/depth_maps/{letter}.jpg.geometric.bin")
            made = found("colmap", sequences=30)
            name = named(made, "abcd")
            assert made.depth_formats(name) == {DepthFormat("colmap", 1.0, "z")}
            for i, tag in enumerate(tags):
                pose, intrinsics = made.poses(name)[i], made.intrinsics(name)[i]
                at = stored.names.index(f"{'abcd'[i]}.jpg")
                assert (made.depths(name)[i] is not None) == (tag == 1)
                if tag not in places:
                    assert pose is intrinsics is None, "mirrored"
                    continue
                point = np.linalg.inv(stored.poses[at]) @ [0.3, 0.2, 2, 1]
                u, v = project(point, stored.poses[at], stored.intrinsics[at])
                assert project(point, pose, intrinsics) == pytest.approx(places[tag](u, v), abs=1e-3)
                assert np.linalg.det(pose) == pytest.approx(1)

    @pytest.mark.parametrize("chain", ["overlap", "angle"])
    def test_real_models_give_the_same_as_text_and_binary(self, shared, raw, found, chain):
        made = []
        for kind in ("sparse", "sparse_txt"):
            for scene in ("door_lund", "fox"):
                (raw / scene).mkdir(exist_ok=True)
                for link, target in (("images", "images"), ("model", kind)):
                    (raw / scene / link).unlink(missing_ok=True)
                    (raw / scene / link).symlink_to(shared / "data/colmap" / scene / target)
            made.append(found("colmap", chain=chain, min_frames=4, sequences=25).sequences)
        assert made[0] == made[1]
        assert {name.split("/")[0] for name in made[0]} == {"door_lund", "fox"}
        for name, frames in made[0].items():
            assert len(frames) == len(set(frames)) >= 4
            assert all((raw / frame).is_file() for frame in frames), name
