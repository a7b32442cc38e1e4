import logging


def test_every_folder_with_images_in_natural_order(add, found):
    add("b/10.png", "b/9.jpg", "b/1.PNG", "a/images/x2.webp", "a/images/x10.jpeg", "a/notes.txt", "c/only.txt")
    assert found("folder").sequences == {
        "a/images": ["a/images/x2.webp", "a/images/x10.jpeg"],
        "b": ["b/1.PNG", "b/9.jpg", "b/10.png"],
    }


def test_scenes_come_in_natural_order_too(add, found):
    add("s10/0.png", "s9/0.png", "s1/0.png")
    assert list(found("folder").sequences) == ["s1", "s9", "s10"]


def test_a_folder_of_images_is_one_sequence(add, found, raw):
    add("0.png", "1.png", "below/0.png")
    assert found("folder").sequences == {raw.name: ["0.png", "1.png"], "below": ["below/0.png"]}


def test_depth_hidden_and_short_folders_are_left_out(add, found, caplog):
    add("s/0.png", "s/1.png", "s/depth/0.png", "s/Masks/1.png", ".cache/0.png", "s/.0.png", "t/0.png")
    with caplog.at_level(logging.INFO):
        assert found("folder", min_frames=2).sequences == {"s": ["s/0.png", "s/1.png"]}
    assert "2 folders of depth" in caplog.text


def test_single_images_are_sequences_of_one(add, found):
    add("n01/a.jpg", "n01/b.jpg", "n02/c.png")
    assert found("folder", single=True).sequences == {n: [n] for n in ("n01/a.jpg", "n01/b.jpg", "n02/c.png")}


def test_the_released_rule_is_the_same(add, found):
    add("a/1.png", "a/2.png")
    assert found("folder", rule="released").sequences == found("folder").sequences


def test_linked_folders_are_followed(add, found, raw, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/0.png").touch()
    (raw / "link").symlink_to(tmp_path / "elsewhere")
    assert found("folder").sequences == {"link": ["link/0.png"]}
