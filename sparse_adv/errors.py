"""The text that messages quote from errors raised by other code."""

from __future__ import annotations


def first_cause(error: BaseException) -> str:
    """Return the first line of the error that came first, if handling it raised others, as when a failed capture ends.

    Examples:
        >>> try:
        ...     try:
        ...         raise RuntimeError("not permitted when stream is capturing")
        ...     finally:
        ...         raise RuntimeError("failed due to a previous error")
        ... except RuntimeError as error:
        ...     first_cause(error)
        'not permitted when stream is capturing'
    """
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message.

    PyTorch's messages often have more lines, with advice or with the stack of C++.

    Examples:
        >>> first_line(RuntimeError("out of memory\\nException raised from malloc")), first_line(KeyError())
        ('out of memory', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
