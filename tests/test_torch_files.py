"""A file of torch.save cannot run code, and is read or refused in bounded time."""

import io
import pickle
import time
import zipfile

import pytest
import torch

from sparse_adv import torch_files


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_data_are_read(zipped):
    state = {"weight": torch.rand(2, 3), "text": "c" * 5000, "numbers": [1, 0.5, None, (True,)]}
    read = torch_files.load(io.BytesIO(saved(state, _use_new_zipfile_serialization=zipped)))
    assert read.pop("weight").equal(state.pop("weight")) and read == state


def named(length):
    """A pickle that names a class."""
    return b"\x80\x02c" + b"a" * length + b"\nb\n."


def in_archive(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, entry in {"a/data.pkl": content, "a/version": b"3\n", "a/byteorder": b"little"}.items():
            archive.writestr(name, entry)
    return file.getvalue()


@pytest.mark.parametrize("length", [10, 1000, 10_000, 4_000_000])
@pytest.mark.parametrize(
    "place", [bytes, in_archive, lambda content: saved(0, _use_new_zipfile_serialization=False)[:-2] + content]
)
def test_a_class_of_any_length_is_refused_at_once(length, place):
    started = time.perf_counter()
    with pytest.raises(Exception, match=r"names a class|Weights only load failed|invalid|magic|corrupt"):
        torch_files.load(io.BytesIO(place(named(length))))
    assert time.perf_counter() - started < 5


def test_a_compressed_archive_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1_000_000))
    with pytest.raises(ValueError, match="compressed"):
        torch_files.load(file)


def test_a_compressed_archive_of_small_tensors_is_refused():
    plain, packed = io.BytesIO(saved({str(i): torch.zeros(1000) for i in range(64)})), io.BytesIO()
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as compressed:
        for entry in archive.infolist():
            compressed.writestr(entry.filename, archive.read(entry))
    assert max(entry.file_size for entry in archive.infolist()) < len(packed.getvalue())
    with pytest.raises(ValueError, match="compressed"):
        torch_files.load(packed)


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02", b"PK\x03\x04", b"text"])
def test_anything_else_is_refused(content):
    with pytest.raises((EOFError, IndexError, pickle.UnpicklingError, RuntimeError)):
        torch_files.load(io.BytesIO(content))
