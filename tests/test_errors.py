"""What messages quote of an error."""

import pytest

from sparse_adv.errors import first_line


@pytest.mark.parametrize(
    ("error", "quoted"),
    [
        (ValueError("one line"), "one line"),
        (RuntimeError("\n first\nsecond"), "first"),
        (ValueError(""), "ValueError"),
        (OSError(" \n"), "OSError"),
        (KeyError("x"), "'x'"),
    ],
)
def test_of_an_error_the_first_line_or_the_type_is_quoted(error, quoted):
    assert first_line(error) == quoted
