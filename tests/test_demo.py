"""What the demo says of its runs follows from their numbers."""

from pathlib import Path

from sparse_adv.demo import DENSE, findings
from sparse_adv.runs import Run


def made_up(name: str, robust: float, seconds: float, densities: dict[str, float]) -> Run:
    records = [{"attack_seconds": seconds - 1 + extra, "update_seconds": 1.0} for extra in (0.0, 0.0, 9.0)]
    return Run(Path(name), {"name": name, "densities": densities}, records, {"test": {"pgd-20": robust}})


def test_findings_tell_cost_and_noise():
    ticket = made_up("ticket", 0.6, 2.0, {"weights": 0.1, "multiply_adds": 0.2})
    costs, noise = findings([ticket, made_up("dense", 0.5, 6.0, DENSE)], 300)
    assert "ticket 2.00 s (3.00x), dense 6.00 s (1.00x)" in costs  # the median: a disturbed epoch does not count
    assert "300 test images, differences under 8 points" in noise
