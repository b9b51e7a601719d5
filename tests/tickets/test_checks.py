"""Checks of tickets: which densities a round may have, and what they say of each weight."""

import pytest
import torch

from sparse_adv.tickets import PruneConfig, TicketInvariantError
from sparse_adv.tickets.checks import check_density


def keeping(*counts: int) -> dict[str, torch.Tensor]:
    """Masks of layers of 10 x 10 weights, of which so many are kept."""
    return {str(i): torch.arange(100).view(10, 10) < count for i, count in enumerate(counts)}


@pytest.mark.parametrize(
    ("scope", "block", "slack"),
    [
        ("global", (1, 1), 1),
        ("global", (2, 2), 4),
        ("uniform", (1, 1), 3),
        ("erk", (2, 1), 6),
        ("global", (1, 1, 3, 3), 9),
    ],
)
def test_a_round_may_miss_its_density_by_one_block_of_each_ranking(scope, block, slack):
    config = PruneConfig(density=0.25, block=block, scope=scope, rounds=2)
    for number, requested in ((1, 150), (2, 75)):
        for kept in (requested - slack, requested, requested + slack):
            first = min(kept, 100)
            masks = keeping(first, kept - first, 0)
            assert check_density(masks, config, number) == (300, kept, requested)
        for kept in (requested - slack - 1, requested + slack + 1):
            first = min(kept, 100)
            with pytest.raises(
                TicketInvariantError, match=f"{kept} of 300 weights are kept, {requested} were requested"
            ):
                check_density(keeping(first, kept - first, 0), config, number)
