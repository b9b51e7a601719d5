"""A file of torch.save cannot run code, and is read or refused in bounded work."""

import io
import pickle
import zipfile
from unittest.mock import Mock

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


def after_headers(content):
    """In the place of the object of a file from before torch 1.6, which three pickles precede."""
    file = io.BytesIO(saved(0, _use_new_zipfile_serialization=False))
    for _ in range(3):
        pickle.load(file)
    return file.getvalue()[: file.tell()] + content


@pytest.mark.parametrize("length", [10, 1000, 10_000, 4_000_000])
@pytest.mark.parametrize("place", [bytes, in_archive, after_headers])
def test_a_class_with_a_long_name_never_reaches_pytorch(length, place, monkeypatch):
    """Whose message about it takes time quadratic in its length."""
    load = Mock(wraps=torch.load)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(Exception, match=r"names a class|Weights only load failed|invalid|magic|corrupt"):
        torch_files.load(io.BytesIO(place(named(length))))
    assert load.called == (length < 1000)


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
