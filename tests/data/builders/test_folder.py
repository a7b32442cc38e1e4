import logging


def test_every_folder_with_images_in_natural_order(add, found, raw, tmp_path):
    add("b10/10.png", "b10/9.jpg", "b10/1.PNG", "b9/images/x2.webp", "b9/images/x10.jpeg", "b9/notes.txt", "c/only.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/0.png").touch()
    (raw / "link").symlink_to(tmp_path / "elsewhere")
    folders = found("folder")
    assert folders.sequences == {
        "b9/images": ["b9/images/x2.webp", "b9/images/x10.jpeg"],
        "b10": ["b10/1.PNG", "b10/9.jpg", "b10/10.png"],
        "link": ["link/0.png"],
    }
    assert list(folders.sequences) == ["b9/images", "b10", "link"]
    assert found("folder", rule="released").sequences == folders.sequences


def test_a_folder_of_images_is_one_sequence(add, found, raw):
    add("0.png", "1.png", "below/0.png")
    assert found("folder").sequences == {raw.name: ["0.png", "1.png"], "below": ["below/0.png"]}
    assert found("folder", single=True).sequences == {n: [n] for n in ("0.png", "1.png", "below/0.png")}


def test_depth_hidden_and_short_folders_are_left_out(add, found, caplog):
    add("s/0.png", "s/1.png", "s/depth/0.png", "s/Masks/1.png", ".cache/0.png", "s/.0.png", "t/0.png")
    with caplog.at_level(logging.INFO):
        assert found("folder", min_frames=2).sequences == {"s": ["s/0.png", "s/1.png"]}
    assert "2 folders of depth" in caplog.text
