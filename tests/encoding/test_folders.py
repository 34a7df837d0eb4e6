from conftest import encoded_picture
from fitv2.encoding.folders import in_folders, list_folders, read_file
from fitv2.encoding.kinds import open_source


def test_folders_are_labels_and_files_are_read_by_their_path(tmp_path):
    for name in ("b/1.png", "a/deep/2.png", "0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded_picture())
    source = open_source(str(tmp_path))
    found = list(in_folders(source))
    assert [(image.label, image.source) for image in found] == [
        ("", "0.png"), ("a", "a/deep/2.png"), ("b", "b/1.png"),
    ]  # fmt: skip
    assert read_file(source.url, found[0]) == encoded_picture()
    labels, images, origin, _ = list_folders(source)
    assert (labels, list(images), origin) == ((), found, "folder names")
