"""Safe reading of pickled NumPy arrays, without NumPy's own unpickling code, which trusts the file.

NumPy's `dtype.__setstate__` accepts flags with which NumPy uses bytes of the file as pointers. Here other classes take
the place of NumPy's while the pickle is read; arrays of plain numbers are then made from their contents.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from typing import IO, Any

import numpy as np

_DTYPE = re.compile(r"[?]|b1|[iu][1248]|f[248]")
_MOST_SHARED = 64
"""Largest average number of times that an object may be contained: a pickle holds it once, but every use copies it."""
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")


def unpickle_arrays(file: IO[bytes]) -> Any:
    """Read a pickle that consists of NumPy arrays and Python's own containers, numbers and text.

    Nothing else is unpickled, so a malicious file cannot run code, read memory or fill it. For the size limit, an
    object that is contained n times counts n times. Arrays hold bool, integers or floats; an object array, such as a
    list of masks, is returned as a list.

    Args:
        file: open for reading bytes. Text that Python 2 pickled is returned as bytes.

    Raises:
        ValueError: if the file contains anything else, is cut short, or is not a pickle.

    Examples:
        >>> import io
        >>> unpickle_arrays(io.BytesIO(pickle.dumps({"labels": [1, 2], "data": np.zeros(2, np.uint8)})))
        {'labels': [1, 2], 'data': array([0, 0], dtype=uint8)}
    """
    content = file.read()
    try:
        _check_memo(content)
        value = _resolved(_ArrayUnpickler(io.BytesIO(content), encoding="bytes").load(), {})
        if _size(value, {}) > _MOST_SHARED * len(content) + 1024:
            raise pickle.UnpicklingError("it contains an object so often that it would fill the memory")
        return value
    except Exception as error:  # a damaged pickle raises many types of errors
        raise ValueError(f"is not a readable pickle of arrays: {error}") from error


class PlainDtype:
    """Stands in for `numpy.dtype`: an element type of numbers, or "O" for objects."""

    def __init__(self, name: str | bytes, align: bool = False, copy: bool = False) -> None:
        name = name.decode("ascii") if isinstance(name, bytes) else str(name)
        if not _DTYPE.fullmatch(name) and name not in ("O", "O8"):
            raise pickle.UnpicklingError(f"it has elements of type {name[:20]!r}, which is not a plain number")
        self.name = name
        self.order: Any = "="

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("it has a structured element type")
        self.order = order

    def of_numpy(self) -> np.dtype:
        if self.name[0] == "O":
            raise pickle.UnpicklingError("it has an array of objects")
        return np.dtype(self.name).newbyteorder(self.order if self.order != "|" else "=")


def plain_scalar(dtype: PlainDtype, content: bytes) -> bool | int | float:
    """Stand in for `numpy.core.multiarray.scalar`: return a Python number."""
    (value,) = np.frombuffer(content, dtype.of_numpy())
    return value.item()


class _Array:
    """Stands in for an array whose content comes later in the pickle."""

    def __init__(self, *_: Any) -> None:
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if isinstance(content, list):
            self.value = content
        else:
            self.value = _from_buffer(content, dtype, shape, "F" if fortran else "C")


def _from_buffer(content: Any, dtype: PlainDtype, shape: Any, order: str) -> np.ndarray:
    return np.frombuffer(content, dtype.of_numpy()).reshape(shape, order="F" if order == "F" else "C").copy(order="K")


def _encode(text: str, encoding: str = "utf-8", *_: Any) -> bytes:
    """Stand in for `_codecs.encode`, which gives the bytes of arrays from Python 2. Other codecs could expand them."""
    if str(encoding) not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r:.30}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        of_arrays = {"_reconstruct": _Array, "scalar": plain_scalar, "_frombuffer": _from_buffer}
        if module in _MODULES and name in of_arrays:
            return of_arrays[name]
        others = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): PlainDtype, ("_codecs", "encode"): _encode}
        if (module, name) in others:
            return others[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of a NumPy array")


def _check_memo(content: bytes) -> None:
    """Raise if the pickle gives an object a very large number: unpickling would allocate a table of that size."""
    for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if "PUT" in operation.name and isinstance(argument, int) and argument > number:
            raise pickle.UnpicklingError(f"it numbers an object {argument} after {number} operations")


def _resolved(value: Any, known: dict[int, Any]) -> Any:
    """The value with real arrays in place of `_Array`s; lists, tuples and dicts are copied, each once."""
    if not isinstance(value, _Array | list | tuple | dict):
        return value
    if id(value) not in known:
        if isinstance(value, _Array):
            made = _resolved(value.value, known)
        elif isinstance(value, dict):
            made = {key: _resolved(item, known) for key, item in value.items()}
        else:
            made = type(value)(_resolved(item, known) for item in value)
        known[id(value)] = made
    return known[id(value)]


def _size(value: Any, known: dict[int, int]) -> int:
    """Bytes of arrays plus elements of containers, if every object is copied as often as it is contained."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if not isinstance(value, list | tuple | dict):
        return 1
    if id(value) not in known:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]
