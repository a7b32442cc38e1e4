"""Sets of images and of label maps, on miniatures of their layouts in folders, tar and zip files; faults."""

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fastmum.data.decode.image import FrameError
from fastmum.data.errors import DataError
from fastmum.evaluate.images import open_images, relabel
from fastmum.evaluate.maps import open_maps, read_label

WNIDS = "n01440764", "n01443537", "n15075141"
SIZE = 20, 12


def picture(value, suffix=".jpg", size=SIZE, mode="RGB"):
    content = io.BytesIO()
    image = Image.new("RGB", size, (value, 0, 255 - value)) if mode == "RGB" else Image.new(mode, size, value)
    image.save(content, {".jpg": "JPEG", ".JPEG": "JPEG", ".png": "PNG"}[suffix])
    return content.getvalue()


def put(root, name, content):
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def put_classes(root, names, count=2, suffix=".JPEG"):
    for i, name in enumerate(names):
        for k in range(count):
            put(root, f"{name}/{Path(name).name}_{k}{suffix}", picture(50 * i, suffix))


def listed(images):
    """Names of files and labels, of training and test."""
    return [[(each.file.name, each.labels) for each in part] for part in (images.train, images.test)]


def readable(images):
    return all(Image.open(io.BytesIO(each.file.read())).size == SIZE for each in images.train + images.test)


def tar(folder, out, nested=False):
    with tarfile.open(out, "w") as archive:
        for path in sorted(folder.iterdir()):
            if nested and path.is_dir():
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w") as each:
                    for file in sorted(path.iterdir()):
                        each.add(file, file.name)
                member = tarfile.TarInfo(f"{path.name}.tar")
                member.size = len(inner.getvalue())
                archive.addfile(member, io.BytesIO(inner.getvalue()))
            else:
                archive.add(path, f"./{path.name}")
    shutil.rmtree(folder)


def pack(folder, out, prefix="", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(out, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{prefix}{file.relative_to(folder)}")


@pytest.fixture
def imagenet(tmp_path):
    root = tmp_path / "imagenet"
    put_classes(root / "train", WNIDS)
    put_classes(root / "val", WNIDS, 1)
    return root


def test_imagenet_in_folders_tar_and_zip_is_the_same(imagenet, tmp_path, caplog, monkeypatch):
    expected = open_images(f"imagenet:{imagenet}")
    assert expected.classes == [*WNIDS]
    assert [len(part) for part in listed(expected)] == [6, 3]
    assert listed(expected)[1] == [(f"{name}/{name}_0.JPEG", (i,)) for i, name in enumerate(WNIDS)]
    assert listed(open_images(str(imagenet))) == listed(expected)
    one = tmp_path / "all.zip"  # one archive as Kaggle has it, with its list and flat validation images
    kaggle = tmp_path / "kaggle"
    shutil.copytree(imagenet / "train", kaggle / "ILSVRC/Data/CLS-LOC/train")
    lines = ["ImageId,PredictionString"]
    for i, name in enumerate((WNIDS[1], WNIDS[0])):
        put(kaggle, f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{i + 1:08d}.JPEG", picture(9, ".JPEG"))
        lines.append(f"ILSVRC2012_val_{i + 1:08d},{name} 1 2 3 4 {name} 5 6 7 8")
    put(kaggle, "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000003.JPEG", picture(9, ".JPEG"))  # without a label
    put(kaggle, "LOC_val_solution.csv", "\n".join(lines))
    pack(kaggle, one)
    for path in (kaggle, one):
        found = open_images(f"imagenet:{path}")
        assert listed(found)[0] == listed(expected)[0]
        assert [each.labels for each in found.test] == [(1,), (0,), ()]
        assert readable(found)
    pack(imagenet / "val", imagenet / "val.zip", "val/", zipfile.ZIP_STORED)
    with zipfile.ZipFile(imagenet / "val.zip", "a") as archive:
        archive.writestr(f"val/{WNIDS[0]}/other.JPEG", picture(9, ".JPEG"), zipfile.ZIP_LZMA)
    shutil.rmtree(imagenet / "val")
    tar(imagenet / "train", imagenet / "train.tar")
    found = open_images(f"imagenet:{imagenet}")
    assert listed(found) == listed(expected)
    assert "val.zip': 1 files are left out" in caplog.text
    monkeypatch.setattr("fastmum.data.archives._members_of", None)  # images are read without listing archives again
    assert readable(found)
    assert len({each.file.key() for each in found.train + found.test}) == 9


def test_an_archive_of_macos_whose_folder_has_another_name_and_what_is_in_no_class(imagenet, tmp_path, caplog):
    expected, one = listed(open_images(str(imagenet))), tmp_path / "all.zip"
    pack(imagenet, one, "mine/")
    for name in ("train", "val"):
        pack(imagenet / name, imagenet / f"{name}.zip", f"{name}/")
        shutil.rmtree(imagenet / name)
    for path in (one, *imagenet.glob("*.zip")):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("__MACOSX/._train", b"")
            archive.writestr("._mine", b"")
    for root in (one, imagenet):
        assert listed(open_images(str(root))) == expected, root
    assert caplog.text == ""
    for name in ("a/0.png", "b/0.png", "thumbs/0.png", "stray.png"):
        for part in ("train", "val"):
            put(tmp_path / "folder" / part, name, picture(9))
    assert open_images(str(tmp_path / "folder")).classes == ["a", "b"]
    assert "1 training images are in no class folder" in caplog.text
    assert "1 folders of thumbnails" in caplog.text


def test_archives_of_single_classes(imagenet):
    """What `tar -xf ILSVRC2012_img_train.tar -C train` leaves, with one class unpacked."""
    expected = listed(open_images(f"imagenet:{imagenet}"))
    for name in WNIDS[1:]:
        with tarfile.open(imagenet / f"train/{name}.tar", "w") as archive:
            for file in sorted((imagenet / "train" / name).iterdir()):
                archive.add(file, file.name)
        shutil.rmtree(imagenet / "train" / name)
    found = open_images(f"imagenet:{imagenet}")
    assert listed(found) == expected
    assert readable(found)


def test_imagenet_as_distributed(imagenet, tmp_path):
    """A tar file of tar files, flat validation images, and the development kit; all of them in a tar file."""
    expected = open_images(f"imagenet:{imagenet}")
    shutil.rmtree(imagenet / "val")
    tar(imagenet / "train", imagenet / "ILSVRC2012_img_train.tar", nested=True)
    for i in range(3):
        put(imagenet, f"flat/ILSVRC2012_val_{i + 1:08d}.JPEG", picture(i, ".JPEG"))
    tar(imagenet / "flat", imagenet / "ILSVRC2012_img_val.tar")
    for content in (None, b"no archive"):
        if content:
            put(imagenet, "ILSVRC2012_devkit_t12.tar.gz", content)
        with pytest.raises(DataError, match="ILSVRC2012_devkit_t12"):
            open_images(f"imagenet:{imagenet}")
    (imagenet / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    kit = imagenet / "ILSVRC2012_devkit_t12/data"
    put(kit, "ILSVRC2012_validation_ground_truth.txt", "2\n2\n1\n")
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    names = WNIDS[2], WNIDS[0], "n00001740"
    synsets = np.array([(i + 1, name, "a", "b", 2 * (i == 2)) for i, name in enumerate(names)], fields)
    savemat(kit / "meta.mat", {"synsets": synsets})
    path = imagenet
    for packing in ("none", "kit", "all"):
        if packing == "kit":
            with tarfile.open(imagenet / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
                archive.add(kit.parent, "ILSVRC2012_devkit_t12")
            shutil.rmtree(kit.parent)
        elif packing == "all":
            tar(imagenet, path := tmp_path / "all.tar")
        found = open_images(f"imagenet:{path}")
        assert listed(found)[0] == listed(expected)[0]
        assert listed(found)[1] == [(f"ILSVRC2012_val_{i:08d}.JPEG", (k,)) for i, k in ((1, 0), (2, 0), (3, 2))]
        assert readable(found)


def test_label_lists(imagenet, tmp_path):
    file, path = tmp_path / "real.json", f"imagenet:{imagenet}"
    for content, expected in (
        ([[0, 2], [], [1]], [(0, 2), (), (1,)]),
        ({f"{WNIDS[1]}/{WNIDS[1]}_0.JPEG": WNIDS[2], f"{WNIDS[0]}_0.JPEG": [0, WNIDS[1]]}, [(0, 1), (2,), ()]),
    ):
        file.write_text(json.dumps(content))
        relabel(images := open_images(path), file)
        assert [each.labels for each in images.test] == expected
    for content, text in (
        ([[0], [1]], "2 labels"),
        ([[0], [3], [1]], "is 3, but must be 0 to 2"),
        ([0, 1, "cat"], "cat"),
        ([0, True, 1], "true"),
        ([0, [{}], 1], "{}"),
        ("cat", "neither a list"),
        (3, "neither a list"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match=text) as error:
            relabel(open_images(path), file)
        assert "real.json" in str(error.value)


def test_class_folders_without_images_and_others(imagenet, tmp_path, caplog):
    (imagenet / "train/n00000001").mkdir()
    found = open_images(f"imagenet:{imagenet}")
    assert (found.classes[0], found.empty) == ("n00000001", ["n00000001"])
    assert "n00000001" in caplog.text
    put(imagenet, "val/n00000000/1.JPEG", picture(1, ".JPEG"))
    with pytest.raises(DataError, match="n00000000"):
        open_images(f"imagenet:{imagenet}")
    shutil.rmtree(imagenet / "train")
    with pytest.raises(DataError, match="no class folders"):
        open_images(f"imagenet:{imagenet}")
    put(imagenet, "train.tar.gz", b"")
    with pytest.raises(DataError, match=r"unpack 'train.tar.gz'"):
        open_images(f"imagenet:{imagenet}")
    put(tmp_path, "broken.tar", b"no archive" * 100)
    for data, text in (
        (tmp_path / "broken.tar", "broken.tar"), (tmp_path / "nowhere", "nowhere"), ("cars:/x", "cars"),
        (f"imagenet:{tmp_path / 'x'}", "x"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=text):
            open_images(str(data))


def test_inaturalist_sun397_and_places(tmp_path, caplog):
    names = "00000_Animalia_Annelida_Lumbricus", "00001_Plantae_Rosa"
    for part in ("train_mini", "val"):
        put_classes(tmp_path / "inat" / part, names, suffix=".jpg")
    found = open_images(f"inaturalist:{tmp_path / 'inat'}")
    assert (found.classes, len(found.train)) == ([*names], 4)
    assert "4 images to train on, of train_mini" in caplog.text
    caplog.clear()
    (tmp_path / "inat/train_mini").rename(tmp_path / "inat/2021_train")
    (tmp_path / "inat/val").rename(tmp_path / "inat/2021_valid")
    assert listed(open_images(f"inaturalist:{tmp_path / 'inat'}")) == listed(found)
    assert caplog.text == ""

    put_classes(tmp_path / "sun/SUN397", ("a/abbey", "a/apse/indoor", "b/unused"), 3, ".jpg")
    lines = [f"/{name}/{Path(name).name}_{{}}.jpg" for name in ("a/abbey", "a/apse/indoor")]
    put(tmp_path, "sun/Partitions/Training_01.txt", "\n".join(line.format(k) for line in lines for k in (0, 1)))
    put(tmp_path, "sun/Partitions/Testing_01.txt", "\n".join(line.format(2) for line in lines) + "\n/a/abbey/gone.jpg")
    found = open_images(f"sun397:{tmp_path / 'sun'}")
    assert (found.classes, len(found.train)) == (["a/abbey", "a/apse/indoor"], 4)
    assert listed(found)[1][1:] == [("a/apse/indoor/indoor_2.jpg", (1,)), ("a/abbey/gone.jpg", (0,))]
    assert found.test[1].file.read()
    with pytest.raises(FrameError):  # counted when images are read
        found.test[2].file.read()
    shutil.copytree(tmp_path / "sun/Partitions", tmp_path / "sun/SUN397", dirs_exist_ok=True)
    pack(tmp_path / "sun/SUN397", tmp_path / "one.zip", "mine/")
    packed = open_images(f"sun397:{tmp_path / 'one.zip'}")
    assert listed(packed) == listed(found)
    assert packed.test[1].file.read()

    shutil.rmtree(tmp_path / "sun/SUN397")
    put(tmp_path, "sun/SUN397.tar.gz", b"")
    assert "unpack 'SUN397.tar.gz'" in open_images(f"sun397:{tmp_path / 'sun'}").hint

    root = tmp_path / "places"
    put_classes(root / "data_256_standard", ("a/airfield", "z/zoo"), 2, ".jpg")
    put(root, "val_256/Places365_val_00000001.jpg", picture(3))
    put(root, "places365_train_standard.txt", "".join(f"/{n}/{Path(n).name}_{k}.jpg {i}\n"
        for i, n in enumerate(("a/airfield", "z/zoo")) for k in range(2)))  # fmt: skip
    put(root, "places365_val.txt", "Places365_val_00000001.jpg 1\n")
    found = open_images(f"places:{root}")
    assert (found.classes, listed(found)[1]) == (["a/airfield", "z/zoo"], [("Places365_val_00000001.jpg", (1,))])
    assert readable(found)
    shutil.copytree(root, packed := tmp_path / "packed")  # archives as distributed, whose folders have other names
    (packed / "in").mkdir()
    (packed / "data_256_standard").rename(packed / "in/data_256")
    tar(packed / "in", packed / "train_256_places365standard.tar")
    (packed / "lists").mkdir()
    for file in packed.glob("*.txt"):
        file.rename(packed / "lists" / file.name)
    tar(packed / "lists", packed / "filelist_places365-standard.tar")
    assert listed(open_images(f"places:{packed}")) == listed(found)
    assert readable(open_images(f"places:{packed}"))
    put(root, "places365_val.txt", "Places365_val_00000001.jpg 2\n")
    with pytest.raises(DataError, match="is 2, but must be 0 to 1"):
        open_images(f"places:{root}")
    put(root, "places365_train_standard.txt", "/a/airfield/airfield_0.jpg 365\n")
    with pytest.raises(DataError, match=r"airfield_0.jpg' is 365, but must be 0 to 364"):
        open_images(f"places:{root}")
    put(root, "places365_train_standard.txt", "\n")
    with pytest.raises(DataError, match="is empty"):
        open_images(f"places:{root}")
    put(root, "places365_val.txt", "Places365_val_00000001.jpg\n")
    with pytest.raises(DataError, match="line 1"):
        open_images(f"places:{root}")
    old = tmp_path / "places205"
    put(old, "images256/a/abbey/x.jpg", picture(1))
    for part in ("train", "val"):
        put(old, f"trainvalsplit_places205/{part}_places205.csv", "a/abbey/x.jpg 0")
    assert readable(open_images(f"places:{old}"))
    for part in ("train", "val"):
        put_classes(tmp_path / "easy" / part, ("airfield", "zoo"), suffix=".jpg")
    assert open_images(f"places:{tmp_path / 'easy'}").classes == ["airfield", "zoo"]


def test_ade20k_in_a_folder_and_in_its_zip(tmp_path):
    root = tmp_path / "data/ADEChallengeData2016"
    for part, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            put(root, f"images/{part}/ADE_{i}.jpg", picture(i))
            put(root, f"annotations/{part}/ADE_{i}.png", picture(i, ".png", mode="L"))
    (root / "annotations/training/ADE_2.png").unlink()
    pack(root.parent, tmp_path / "ADEChallengeData2016.zip")
    for path in (root, root.parent, tmp_path / "ADEChallengeData2016.zip", tmp_path):  # the last one holds the zip
        found = open_maps(f"ade20k:{path}")
        assert (found.most, found.ignore, len(found.train), len(found.test)) == (150, (0, 255), 3, 2)
        image = Image.open(io.BytesIO(found.test[1].file.read()))
        assert (read_label(found.test[1], image, 150) == 1).all()
        with pytest.raises(FrameError, match="no labels"):
            read_label(found.train[2], image, 150)
    label = root / "annotations/validation/ADE_1.png"
    for content, text in (
        (picture(1, ".png", (12, 20), "L"), "12 x 20"), (picture(200, ".png", mode="L"), "label 200"),
        (picture(1, ".png"), "mode RGB"), (picture(1, ".png", mode="L")[:60], "truncated"), (b"", "empty"),
    ):  # fmt: skip
        label.write_bytes(content)
        with pytest.raises(FrameError, match=text):
            read_label(open_maps(f"ade20k:{root}").test[1], image, 150)
    label.write_bytes(picture(255, ".png", mode="L"))
    assert read_label(open_maps(f"ade20k:{root}").test[1], image, 150).max() == 255
    for data in (str(root), f"ade20k:{tmp_path / 'data/x'}", f"ade20k:{root / 'images'}", "cars:x"):
        with pytest.raises(DataError):
            open_maps(data)


def test_voc_with_the_images_of_sbd_that_are_not_tested_on(tmp_path, caplog):
    voc, sbd = tmp_path / "VOCdevkit/VOC2012", tmp_path / "benchmark_RELEASE/dataset"
    for part, names in (("train", "ab"), ("val", "cd")):
        put(voc, f"ImageSets/Segmentation/{part}.txt", "\n".join(names))
    for i, name in enumerate("abcd"):
        put(voc, f"JPEGImages/{name}.jpg", picture(i))
        put(voc, f"SegmentationClass/{name}.png", picture(i, ".png", mode="P"))
    (tmp_path / "other.tar").write_bytes(b"no archive")  # nothing that the set needs
    assert [each.file.name for each in open_maps(f"voc:{tmp_path}").train] == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    put(sbd, "train.txt", "a\ne")
    put(sbd, "val.txt", "c\nf")
    (sbd / "cls").mkdir()
    for i, name in enumerate("ef"):
        put(sbd, f"img/{name}.jpg", picture(i))
        segmentation = np.array([(np.full(SIZE[::-1], i + 5, np.uint8),)], [("Segmentation", "O")])
        savemat(sbd / f"cls/{name}.mat", {"GTcls": segmentation})
    found = open_maps(f"voc:{tmp_path}")
    assert [each.file.name[-5:] for each in found.train] == ["a.jpg", "b.jpg", "e.jpg", "f.jpg"]
    assert [each.file.name for each in found.test] == ["JPEGImages/c.jpg", "JPEGImages/d.jpg"]
    shutil.copytree(tmp_path / "VOCdevkit", tmp_path / "packed/in/VOCdevkit")
    tar(tmp_path / "packed/in", tmp_path / "packed/VOCtrainval_11-May-2012.tar")
    put(tmp_path, "packed/benchmark.tgz", b"")
    packed = open_maps(f"voc:{tmp_path / 'packed'}")
    assert [each.file.name for each in packed.test] == [each.file.name for each in found.test]
    assert packed.test[1].label.read() == found.test[1].label.read()
    assert "2 images to train on" in caplog.text
    assert "benchmark.tgz" in caplog.text
    image = Image.open(io.BytesIO(found.train[3].file.read()))
    values = [np.unique(read_label(each, image, 20)).tolist() for each in found.train]
    assert values == [[0], [1], [5], [6]]
    put(sbd, "cls/f.mat", b"damaged")
    with pytest.raises(FrameError, match="cannot be read"):
        read_label(found.train[3], image, 20)
