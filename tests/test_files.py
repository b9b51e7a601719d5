"""Files are written atomically."""

import os
import resource

import pytest

from sparse_adv import files


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path):
    path = tmp_path / "table.md"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "weights"
    files.write_bytes(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the kernel refuses larger files, as on a full disk
    try:
        with pytest.raises(OSError):
            files.write_bytes(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_writing_names_the_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            files.write_bytes(tmp_path / "weights", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "weights")


def test_a_link_to_nowhere_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match=r"link to one that does not exist.*link'"):
        files.write_text(tmp_path / "link" / "file", "text")


def test_what_is_no_regular_file_is_neither_replaced_nor_writable(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "Not a regular file"), ("folder", "Is a directory")):
        for write in (files.check_writable, lambda path: files.write_text(path, "text")):
            with pytest.raises(OSError, match=f"{kind}.*{name}"):
                write(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir()


def test_whether_a_file_can_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file", tmp_path / "new" / "file"):
        files.check_writable(path)
    assert (tmp_path / "file").read_text() == "old" and not [*(tmp_path / "new").iterdir()]
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(OSError) as caught:
            files.check_writable(path)
        assert caught.value.filename in (str(path), str(path.parent))
