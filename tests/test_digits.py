"""What the demo says of its runs follows from their numbers."""

import math

import pytest

from sparse_adv.experiments.digits import DENSE, Run, findings


def made_up(name: str, before: float, accuracies: list[float], seconds: float, densities: dict[str, float]) -> Run:
    records = [
        {"attack_seconds": seconds - 1, "update_seconds": 1.0, "seconds": seconds * i, "robust_accuracy": accuracy}
        for i, accuracy in enumerate(accuracies, 1)
    ]
    return Run(name, before, densities | {"test_robust": accuracies[-1]}, records)


TICKET = made_up("ticket", 10.0, [0.3, 0.5, 0.6], 2.0, {"weights": 0.1, "multiply_adds": 0.2})
FULL = made_up("dense", 0.0, [0.2, 0.4, 0.5], 6.0, DENSE)


def test_seconds_to_a_level_include_the_search():
    assert TICKET.seconds_to(0.5) == 14.0
    assert FULL.seconds_to(0.5) == 18.0
    assert FULL.seconds_to(0.6) == math.inf


@pytest.mark.parametrize(("before", "winner"), [(10.0, "ticket"), (15.0, "dense")])
def test_the_faster_run_is_named_first_whichever_it_is(before, winner):
    ticket = Run(TICKET.name, before, TICKET.facts, TICKET.records)
    assert findings([ticket, FULL], 300)[0].startswith(
        f"First to 50.0% robust validation accuracy, search included: {winner} after"
    )


def test_findings_tell_end_noise_and_cost():
    told = findings([TICKET, FULL], 300)
    assert "ticket 60.0%, dense 50.0%" in told[1] and "under 8 points" in told[1]
    assert "ticket 2.00 s (3.00x), dense 6.00 s (1.00x)" in told[2]
