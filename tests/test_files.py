"""Files appear whole or not at all; a pickle brings arrays and nothing else."""

import io
import pickle
import resource

import numpy as np
import pytest

from sparse_adv import files


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "table.md"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as draft:
        draft.write_text("half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_loses_nothing(tmp_path):
    path = tmp_path / "weights"
    files.write_bytes(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the kernel refuses to write further
    try:
        with pytest.raises(OSError):
            files.write_bytes(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_come_back(protocol):
    batch = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2], "text": ("a", None, 0.5)}
    found = files.unpickle_arrays(io.BytesIO(pickle.dumps(batch, protocol)))
    assert np.array_equal(found.pop(b"data"), batch.pop(b"data")) and found[b"labels"] == [1, 2]


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
def test_anything_else_is_refused_and_not_run(content, capsys):
    with pytest.raises(ValueError, match="is no readable pickle of arrays"):
        files.unpickle_arrays(io.BytesIO(content))
    assert capsys.readouterr().out == ""
