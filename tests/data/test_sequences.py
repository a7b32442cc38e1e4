import logging

import pytest
from PIL import Image

from fastmum.data.sequences import DataError, Sequences, find_sequences, find_single_images, split_held_out


@pytest.fixture
def tree(tmp_path):
    def add(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(path) if path.suffix != ".txt" else path.write_text("")
        return tmp_path

    return add


def names_of(sequences):
    return {name: [f.name for f in frames] for name, frames in zip(sequences.names, sequences.frames, strict=True)}


def test_every_folder_with_images_in_natural_order(tree):
    root = tree("b/10.png", "b/9.jpg", "b/1.PNG", "a/images/x2.webp", "a/images/x10.jpeg", "a/notes.txt", "c/only.txt")
    assert names_of(find_sequences(root)) == {"a/images": ["x2.webp", "x10.jpeg"], "b": ["1.PNG", "9.jpg", "10.png"]}


def test_scenes_come_in_natural_order_too(tree):
    assert find_sequences(tree("s10/0.png", "s9/0.png", "s1/0.png")).names == ("s1", "s9", "s10")


def test_a_folder_of_images_is_one_sequence(tree):
    root = tree("0.png", "1.png")
    assert names_of(find_sequences(root)) == {root.name: ["0.png", "1.png"]}


def test_depth_hidden_and_short_folders_are_left_out_and_said(tree, caplog):
    root = tree("s/0.png", "s/1.png", "s/depth/0.png", "s/depth/1.png", ".cache/0.png", ".cache/1.png", "t/0.png")
    with caplog.at_level(logging.INFO):
        assert find_sequences(root, min_views=2).names == ("s",)
    assert "1 folders of depth" in caplog.text
    assert "fewer than 2 images and are left out: t" in caplog.text


def test_nothing_to_train_on_is_one_line(tree):
    with pytest.raises(DataError, match=r"data.root is '.*nowhere', but there is no such folder"):
        find_sequences(tree("a/0.png") / "nowhere")
    with pytest.raises(DataError, match=r"no folder in it holds at least 5 images"):
        find_sequences(tree("a/0.png"), min_views=5)
    with pytest.raises(DataError, match=r"data\.image_root"):
        find_single_images(tree("a/0.png") / "nowhere")


def test_single_images_are_sequences_of_one(tree):
    found = find_single_images(tree("n01/a.jpg", "n01/b.jpg", "n02/c.png"))
    assert found.names == ("n01/a.jpg", "n01/b.jpg", "n02/c.png")
    assert all(len(frames) == 1 for frames in found.frames)


def sequences(names):
    names = tuple(names)
    return Sequences(names, tuple(() for _ in names))


@pytest.mark.parametrize(("count", "share", "held"), [(20, 0.2, 4), (20, 0.01, 1), (2, 0.1, 1), (1, 0.5, 0), (9, 0, 0)])
def test_how_many_are_held_out(count, share, held):
    training, held_out = split_held_out(sequences(f"s{i}" for i in range(count)), share)
    assert len(held_out) == held
    assert sorted(training.names + held_out.names) == sorted(f"s{i}" for i in range(count))


def test_more_data_moves_nothing_from_held_out_to_training_at_the_same_count():
    few = split_held_out(sequences(["a", "b", "c", "d"]), 0.5)[1].names
    assert split_held_out(sequences(["d", "c", "b", "a"]), 0.5)[1].names == tuple(n for n in "dcba" if n in few)
