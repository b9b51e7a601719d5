"""Filter rows that read padding are left out on a CPU where images are batch-vectorised: the results stay the same."""

from itertools import pairwise

import pytest
from helpers.convolution_cases import Case, assert_passes_equal


@pytest.mark.parametrize("image", [(3, 2), (4, 4), (7, 8), (33, 17)], ids=str)
@pytest.mark.parametrize("block", [(2, 2), (4, 4), (4, 4, 3, 3)], ids=str)
@pytest.mark.parametrize(
    ("filter", "padding", "dilation", "stride"),
    [
        ((3, 3), (1, 1), 1, (1, 1)),
        ((3, 3), (0, 1), 1, (1, 1)),
        ((3, 3), (4, 1), 1, (1, 1)),  # the first and the last row of positions read padding alone
        ((5, 3), (2, 1), 1, (1, 1)),
        ((3, 3), (3, 3), 3, (1, 1)),
        ((3, 3), (1, 1), 1, (2, 1)),
    ],
    ids=str,
)
def test_filter_rows_that_read_padding_are_left_out(image, block, filter, padding, dilation, stride):
    case = Case(19, 1, 12, 12, image, filter, stride, padding, (dilation, dilation), block, 0.5, "channels_last")
    assert_passes_equal(case.results(case.pattern("sparse")), case.expected())


def test_column_indices_that_are_not_sorted_by_filter_row_give_the_same_results():
    case = Case(19, 1, 12, 12, (4, 4), block=(4, 4), density=0.5)
    pattern = case.pattern("sparse")
    lists = (
        (pattern.row_offsets, pattern.col_indices),
        (pattern.grad_input_row_offsets, pattern.grad_input_col_indices),
    )
    for offsets, indices in lists:
        for begin, end in pairwise(offsets.tolist()):
            indices[begin:end] = indices[begin:end].sort().values
    assert_passes_equal(case.results(pattern), case.expected())
