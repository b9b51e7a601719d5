"""Checks arguments of public functions: their types, against the annotations, and counts."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from numbers import Integral
from reprlib import Repr
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

_NOT_CHECKED = {float, object, inspect.Parameter.empty}
"""Annotations that are not checked here: for float and object the function checks the value itself, and `empty` stands
for no annotation."""


class _Shortened(Repr):
    """The ends of a repr, with the shapes of tensors and arrays in place of their values."""

    def repr_instance(self, value: Any, level: int) -> str:
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape:
            kind = "an array" if isinstance(value, np.ndarray) else f"a {type(value).__name__.lower()}"
            return f"{kind} of shape {tuple(shape)}"
        return super().repr_instance(value, level)


def shortened(value: object) -> str:
    """A value for one line of an error message: the shape of a tensor or an array, the ends of any other value's repr.

    Examples:
        >>> shortened(10**60), shortened(["a", np.zeros((2, 3))])
        ('100000000000000000...0000000000000000000', "['a', an array of shape (2, 3)]")
    """
    return " ".join(_Shortened().repr(value).split())


def check_count(name: str, count: object, least: int) -> None:
    """Raise ValueError unless `count` is an integer from `least` to 2^63 - 1.

    Examples:
        >>> check_count("steps", 2.5, least=1)
        Traceback (most recent call last):
        ...
        ValueError: steps must be an integer of at least 1, got 2.5
    """
    if isinstance(count, bool) or not isinstance(count, Integral) or count < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {shortened(count)}")
    if int(count) >= 1 << 63:
        raise ValueError(f"{name} must be less than 2^63, got {shortened(count)}")


def checks_types(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that it raises TypeError for an argument of a wrong type, naming argument and value.

    Annotations that are classes, generic classes and unions of these are checked; for a generic class, only the class
    itself. Text does not count as a sequence. A call takes some microseconds more, so do not use this for functions of
    single steps.

    Examples:
        >>> from collections.abc import Sequence
        >>> @checks_types
        ... def area(shape: Sequence[int]) -> int:
        ...     return shape[0] * shape[1]
        >>> area((2, 3))
        6
        >>> area(None)
        Traceback (most recent call last):
        ...
        TypeError: shape must be of type Sequence, got None
    """

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        signature, classes = _of(function)
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:  # its message does not name the function
            raise TypeError(f"{function.__qualname__}() {error}") from None
        for name, value in given.arguments.items():
            wanted = classes.get(name)
            if wanted and not _is_one_of(value, wanted):
                listed = " or ".join("None" if each is types.NoneType else each.__name__ for each in wanted)
                raise TypeError(f"{name} must be of type {listed}, got {shortened(value)}")
        return function(*args, **kwargs)

    return checked


@functools.cache
def _of(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, tuple[type, ...]]]:
    """The signature, and the classes of each checked argument. Annotations may name what is defined later."""
    signature = inspect.signature(function, eval_str=True)
    return signature, {name: tuple(_classes(each.annotation)) for name, each in signature.parameters.items()}


def _classes(hint: Any) -> Iterator[type]:
    """The classes that an annotation allows; none if it is not checked."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found = [types.NoneType if part is None else get_origin(part) or part for part in parts]
    if all(isinstance(part, type) for part in found) and not _NOT_CHECKED.intersection(found):
        yield from found


def _is_one_of(value: object, wanted: tuple[type, ...]) -> bool:
    if isinstance(value, str | bytes) and str not in wanted:
        return False
    if isinstance(value, bool | np.bool_):
        return bool in wanted
    if isinstance(value, Integral):  # also those of NumPy
        return int in wanted
    return isinstance(value, wanted)
