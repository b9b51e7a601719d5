"""Files are written atomically; a pickle of arrays cannot run code."""

import io
import pickle
import resource

import numpy as np
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


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_are_read_back(protocol):
    batch = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2], "text": ("a", None, 0.5)}
    read = files.unpickle_arrays(io.BytesIO(pickle.dumps(batch, protocol)))
    assert np.array_equal(read.pop(b"data"), batch.pop(b"data")) and read[b"labels"] == [1, 2]


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Malicious()),
        pickle.dumps({"data": np.zeros(3), "more": Malicious()}),
        pickle.dumps(np.array([Malicious()], dtype=object)),
        pickle.dumps(np.zeros(100))[:50],
        b"no pickle",
        b"",
    ],
)
def test_any_other_content_is_refused_and_not_executed(content, capsys):
    with pytest.raises(ValueError, match="is not a readable pickle of arrays"):
        files.unpickle_arrays(io.BytesIO(content))
    assert capsys.readouterr().out == ""
