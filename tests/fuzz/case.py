"""What a case of the campaign may end in: a right value, or one clear sentence."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

REFUSALS = (ValueError, TypeError, RuntimeError)
_LONGEST = 600
_NO_REFUSAL = re.compile(r"can't allocate memory|not enough memory|INTERNAL ASSERT|please report a bug", re.IGNORECASE)


class Wrong(AssertionError):
    """A case ended otherwise than it may; the text says how."""


Case = Callable[[random.Random, Path], str]
"""A case draws all of its decisions from the generator and may write to the folder.

It returns the kind of its end, for the counts, such as "masked_conv2d: refused", or raises `Wrong`.
"""


def check_refusal(error: Exception, allowed: tuple[type[Exception], ...], names: Sequence[str]) -> None:
    """Raise Wrong unless an exception has an allowed type and one sentence that contains one of the names.

    Args:
        error: the exception.
        allowed: the exact types that it may have.
        names: of the arguments, or of the file; a name counts as a whole word.
    """
    text = str(error)
    kind = f"{type(error).__name__}: {text[:300]}"
    if type(error) not in allowed:
        raise Wrong(f"another type of exception: {kind}") from error
    if _NO_REFUSAL.search(text):
        raise Wrong(f"the input was not checked: {kind}") from error
    if not text.strip() or "\n" in text.strip() or len(text) > _LONGEST:
        raise Wrong(f"not one sentence ({len(text)} characters): {kind}") from error
    if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names):
        raise Wrong(f"the sentence names none of {', '.join(names)}: {kind}") from error
