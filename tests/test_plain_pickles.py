"""A pickle of arrays cannot run code, read memory, or fill it."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

from sparse_adv.plain_pickles import unpickle_arrays


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_are_read_back(protocol):
    batch = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2], "text": ("a", None, 0.5)}
    read = unpickle_arrays(io.BytesIO(pickle.dumps(batch, protocol)))
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
        unpickle_arrays(io.BytesIO(content))
    assert capsys.readouterr().out == ""


class Reduced:
    """An object whose pickle holds this call and state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def scalar(dtype, content):
    return Reduced(np._core.multiarray.scalar, (dtype, content))


OBJECTS_WITHOUT_THEIR_FLAGS = Reduced(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))


ARRAY_OF_THEM = (
    b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01\x85"
    b"cnumpy\ndtype\nU\x02O8\x89\x88\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89U\x08AAAAAAAAtb."
)


HOSTILE = [
    pickle.dumps(scalar(OBJECTS_WITHOUT_THEIR_FLAGS, b"AAAAAAAA")),
    ARRAY_OF_THEM,
    pickle.dumps(scalar(np.dtype("V8"), b"AAAAAAAA")),
    pickle.dumps(scalar(np.dtype([("a", "f4")]), b"AAAA")),
    pickle.dumps(np.array(["text"])),
    pickle.dumps(np.array([1], "datetime64[s]")),
    pickle.dumps(np.array([1j])),
]
PROGRAM = """
import io, pickle, sys
from sparse_adv.plain_pickles import unpickle_arrays
for content in pickle.load(sys.stdin.buffer):
    try:
        unpickle_arrays(io.BytesIO(content))
    except ValueError as error:
        print(error)
"""


def test_only_plain_numbers_are_rebuilt():
    """In a process of its own: NumPy's unpickling takes bytes of the file for a pointer and crashes."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], input=pickle.dumps(HOSTILE), capture_output=True)
    lines = run.stdout.decode().splitlines()
    assert run.returncode == 0 and len(lines) == len(HOSTILE)
    assert all(line.startswith("is not a readable pickle of arrays: it has ") for line in lines)


def test_scalars_orders_and_lists_of_arrays_are_read_back():
    masks = np.empty(2, dtype=object)
    masks[:] = [np.eye(2, dtype=bool), np.asfortranarray(np.arange(6.0).reshape(2, 3))]
    first, second = unpickle_arrays(io.BytesIO(pickle.dumps(masks)))
    assert np.array_equal(first, masks[0]) and np.array_equal(second, masks[1])
    read = unpickle_arrays(io.BytesIO(pickle.dumps([np.float64(0.5), np.int32(3), np.arange(3, dtype=">i4")])))
    assert read[:2] == [0.5, 3] and read[2].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "dtype", ["?", *(f"{order}{kind}{size}" for order in "<>" for kind in "fiu" for size in (2, 4, 8))]
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["array", "object"])
def test_numbers_of_every_size_are_read_back(dtype, wrapped):
    array = np.array([0, 1, 100], dtype)
    content = np.empty(1, object) if wrapped else array
    if wrapped:
        content[0] = array
    read = unpickle_arrays(io.BytesIO(pickle.dumps(content)))
    assert np.array_equal(read[0] if wrapped else read, array)


def bomb_of_references(innermost, depth):
    for _ in range(depth):
        innermost = [innermost, innermost]
    return pickle.dumps(innermost)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02Nr\xff\xff\xff\x0f.",  # "remember None as number 2**28 - 1": NumPy's table would have 4 GB
        b"\x80\x04B\xff\xff\xff\x7f" + b"a" * 100 + b".",
        b"]" * 50_000 + b"a" * 49_999 + b".",
        b"\x80\x02]q\x00h\x00a.",  # a list that contains itself
        pickle.dumps(Reduced(__import__("_codecs").encode, ("a" * 100, "hex"))),
    ],
)
def test_sizes_depth_and_cycles_are_bounded(content):
    with pytest.raises(ValueError, match="is not a readable pickle of arrays"):
        unpickle_arrays(io.BytesIO(content))


def test_shared_references_are_not_multiplied():
    same = [1, 2]
    value = unpickle_arrays(io.BytesIO(pickle.dumps([same, same])))
    assert value[0] is value[1]


@pytest.mark.parametrize("innermost", [[0], np.zeros(1000)], ids=["list", "array"])
@pytest.mark.parametrize("depth", [28, 60])
def test_what_contains_an_object_again_and_again_is_refused(innermost, depth):
    with pytest.raises(ValueError, match="contains an object so often"):
        unpickle_arrays(io.BytesIO(bomb_of_references(innermost, depth)))
    same = np.ones((4, 4), bool)
    assert len(unpickle_arrays(io.BytesIO(pickle.dumps([same] * 9)))) == 9
