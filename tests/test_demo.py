"""The sentences of the demo follow from the numbers of its runs."""

from pathlib import Path

from helpers.run_folders import epoch_record

from sparse_adv.config import TrainConfig
from sparse_adv.demo import findings
from sparse_adv.runs import DENSE, NO_COST, Cost, Density, Run, RunInfo, TicketChecks, TrainResult


def made_up(name: str, robust: float, seconds: float, density: Density) -> Run:
    info = RunInfo("train", TrainConfig(), name=name, density=density)
    records = [
        epoch_record(epoch, attack=Cost(seconds - 1 + extra), update=Cost(1.0))
        for epoch, extra in enumerate((0.0, 0.0, 9.0), 1)
    ]
    result = TrainResult(NO_COST, TicketChecks(), "best", 1, robust, {"pgd-20": robust})
    return Run(Path(name), info, records, result)


def test_the_sentences_have_the_cost_of_an_epoch_and_the_uncertainty_of_the_accuracies():
    ticket = made_up("ticket", 0.6, 2.0, Density(0.1, 0.2))
    costs, noise = findings([ticket, made_up("dense", 0.5, 6.0, DENSE)], 300)
    assert "ticket 2.00 s (3.00x), dense 6.00 s (1.00x)" in costs  # medians: one slow epoch does not change them
    assert "300 test images, differences under 8 points" in noise
